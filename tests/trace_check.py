"""What trace.json must be: what its schema says, and what a schema cannot say of times and arrows."""

from collections import defaultdict
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
_KNOWN = {
    *("$schema", "title", "type", "enum", "oneOf", "properties", "required", "additionalProperties", "items"),
    *("minimum", "minLength"),
}


def problems(value: Any, schema: dict[str, Any], where: str = "trace") -> list[str]:
    """What does not fit a JSON schema, of the few words of that language that are used here."""
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if "oneOf" in schema:
        tried = [problems(value, each, where) for each in schema["oneOf"]]
        fitting = sum(not found for found in tried)
        return [] if fitting == 1 else [f"{where} fits {fitting} of several: {min(tried, key=len)}"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where} is {value!r}"]
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool):
        return [f"{where} is no {kind}"]
    if kind == "array":
        inside = schema["items"]
        return [each for place, item in enumerate(value) for each in problems(item, inside, f"{where}[{place}]")]
    if kind == "object":
        known = schema["properties"]
        found = [f"{where} lacks {name}" for name in schema["required"] if name not in value]
        assert schema["additionalProperties"] is False
        found += [f"{where} has {name}" for name in value if name not in known]
        return found + [
            each for name in value if name in known for each in problems(value[name], known[name], f"{where}.{name}")
        ]
    size = len(value) if isinstance(value, str) else value
    least = schema.get("minLength" if isinstance(value, str) else "minimum", size)
    return [f"{where} is {value!r}, too small"] if size < least else []


def check_times(trace: dict[str, Any]) -> None:
    """Slices of a track come in the order of time and nest; arrows are pairs, forward in time, from slice to slice."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    named = set()
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "M":
            named.add((event["pid"], event["tid"]))
        else:
            arrows[event["id"]].append(event)
    assert tracks.keys() <= named
    for events in tracks.values():
        assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
        open_until: list[float] = []
        for event in events:
            while open_until and open_until[-1] <= event["ts"] + 1e-6:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 1e-6, f"{event} crosses the end of another"
            open_until.append(end)
    starts = {key: {event["ts"] for event in events} for key, events in tracks.items()}
    for pair in arrows.values():
        assert [event["ph"] for event in pair] == ["s", "f"]
        assert pair[0]["ts"] < pair[1]["ts"] and pair[0]["pid"] == pair[1]["pid"]
        assert all(event["ts"] in starts[event["pid"], event["tid"]] for event in pair)
