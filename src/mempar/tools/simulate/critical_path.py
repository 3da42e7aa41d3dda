"""The critical path: the tasks, from the end of a step back to its start, each of which the next one had to wait for.

Its durations add up to the step. What lies on it is what to make faster; everything else has time to spare.
"""

from collections import defaultdict
from dataclasses import dataclass

from mempar.tools.simulate.timeline import COMPUTE, Timeline

# Phases that are named, largest first.
_MOST_NAMED = 6


@dataclass(frozen=True)
class Segment:
    """One task on the path.

    Attributes:
        kind: `compute`, `collective` or `message`.
        phase: what it is called.
        stage: pipeline stage; of a message the one that sends it.
        rank: position in the stage.
        picoseconds: its duration.
    """

    kind: str
    phase: str
    stage: int
    rank: int
    picoseconds: int


def critical_path(timeline: Timeline) -> list[Segment]:
    """The path of a step, first task first; tasks of no duration are left out."""
    stage = max(range(timeline.num_stages), key=lambda place: int(timeline.clocks[place].max()))
    rank, number = int(timeline.clocks[stage].argmax()), timeline.last[stage]
    found: list[Segment] = []
    while number >= 0:
        task = timeline.tasks[number]
        duration = task.duration_of(rank)
        if task.kind != "wait" and duration:
            place = task.stages[0] if stage not in task.stages or task.kind == "message" else stage
            found.append(Segment(task.kind, task.phase, place, rank, duration))
        if task.decided_by is None:
            (number,) = task.before
        elif task.members is None:
            number = task.before[int(task.decided_by[rank])]
        else:
            member = int(task.decided_by[task.members.group_of(rank)])
            position, rank = task.members.rank_of(rank, member)
            number, stage = task.before[position], task.stages[position]
        if number >= 0 and stage not in timeline.tasks[number].stages:
            stage = timeline.tasks[number].stages[0]
    return found[::-1]


def path_words(segments: list[Segment]) -> str:
    """The path in words: what it is made of, and which stages it goes through."""
    total = sum(segment.picoseconds for segment in segments)
    if not total:
        return "no task takes any time"
    by_phase: dict[tuple[str, str], int] = defaultdict(int)
    by_stage: dict[int, int] = defaultdict(int)
    for segment in segments:
        what = "computing" if segment.kind == COMPUTE else "communication"
        by_phase[segment.phase, what] += segment.picoseconds
        by_stage[segment.stage] += segment.picoseconds
    computing = sum(time for (_, what), time in by_phase.items() if what == "computing")
    ranked = sorted(by_phase.items(), key=lambda item: -item[1])
    named = ", ".join(f"{phase} {time / total:.1%}" for (phase, _), time in ranked[:_MOST_NAMED])
    rest = sum(time for _, time in ranked[_MOST_NAMED:])
    others = f", {len(ranked) - _MOST_NAMED} others {rest / total:.1%}" if rest else ""
    ends = f"begins on stage {segments[0].stage} and ends on stage {segments[-1].stage}"
    longest = max(by_stage, key=lambda stage: by_stage[stage])
    where = "" if len(by_stage) == 1 else f"; it {ends}, {by_stage[longest] / total:.0%} of it on stage {longest}"
    return f"{computing / total:.1%} of the critical path computes: {named}{others}{where}"
