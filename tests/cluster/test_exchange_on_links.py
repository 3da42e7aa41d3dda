"""Predicted time of exchanges against measured, between two hosts on links of known rate and delay.

    make cluster ARGS="-k exchange_takes"      one link
    make soak ARGS="-k on_every_link"          all of them; the figures go to benchmarks/results/

The links' parameters come from the probe alone. What is measured are the collectives of a lookup, forward and backward,
from the moment all ranks call one to the end of the last. Every link delays a little: gloo uses both directions of a
connection at once only where ranks call within a message's way of each other (see collective_time.py).

A busy machine only adds to the time, so an exchange is measured some times over until its two fastest attempts agree,
whatever was predicted, and the fastest is compared. Held to the prediction is the sum over the phases. Phases are
written down beside their predictions, and must be the same ones: single ones of 20 to 60 ms, in which ranks wait for
the host and not for the link, were found up to a third off, those inside a host more than half.
"""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from hosts import Hosts
from linked_ranks import RANKS_PER_HOST, LinkedRanks, Lookup, Timed, lookups
from mempar.parallel.cost import exchange_bytes
from mempar.parallel.exchange_time import exchange_calls
from shaped_links import delayed, shaped, steady_tcp

TOLERANCE = 0.10
# What headers and acknowledgements may add to the interface's count.
COUNTER_TOLERANCE = 0.06
# Tokens a rank at 100 Mbit/s; a faster link gets more, so that it bounds and not the processor.
SIZES = (400, 900, 2000)
# Mbit/s and seconds one way. At 1000 Mbit/s two cores that run four ranks and the delay line bound, not the link.
LINK, LINKS = (100, 0.002), ((50, 0.002), (100, 0.002), (200, 0.002), (500, 0.002), (100, 0.01))
# Attempts at an exchange, and how close the two fastest of them must be for there to be no more.
LEAST_ATTEMPTS, MOST_ATTEMPTS, AGREEMENT = 5, 12, 0.02
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.cluster
def test_exchange_takes_the_predicted_time(hosts: Hosts, note_figure: Callable[[str, float], None]) -> None:
    rows = rows_on_link(hosts, *LINK)["rows"]
    assert len(rows) == 4 * len(SIZES)
    note_figure("time of an exchange, predicted against measured", max(abs(row["deviation"]) for row in rows))
    assert not any(is_off(row) for row in rows), [off(row) for row in rows]


@pytest.mark.soak
def test_exchange_takes_the_predicted_time_on_every_link(tmp_path: Path) -> None:
    links = []
    for mbit, seconds in LINKS:
        with Hosts() as hosts:
            links.append(rows_on_link(hosts, mbit, seconds))
    beyond = [f"{link['mbit']} Mbit/s: {off(row)}" for link in links for row in link["rows"] if is_off(row)]
    # What is published are the figures of a run that passed.
    written = write_results(links, tmp_path if beyond else RESULTS)
    assert not beyond, f"{len(beyond)} exchanges, see {written}: {beyond}"


def made_up(tokens: int, deviation: float) -> dict[str, Any]:
    return {"layout": "rows", "tokens": tokens, "predicted_us": 1.0, "measured_us": 1.0, "deviation": deviation}


def test_what_fails_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]
    rows = [made_up(5, 0.01), made_up(7, -0.11), made_up(9, 0.12)]
    monkeypatch.setattr(here, "Hosts", contextlib.nullcontext)
    monkeypatch.setattr(here, "rows_on_link", lambda hosts, mbit, seconds: {"mbit": mbit, "rows": rows})
    monkeypatch.setattr(here, "RESULTS", tmp_path / "results")
    with pytest.raises(AssertionError, match=rf"^{2 * len(LINKS)} exchanges, see .*7 tokens.*9 tokens"):
        test_exchange_takes_the_predicted_time_on_every_link(tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1 and not (tmp_path / "results").exists()
    del rows[1:]
    test_exchange_takes_the_predicted_time_on_every_link(tmp_path)
    assert len(list((tmp_path / "results").glob("*.json"))) == 1


def test_attempts_end_whatever_was_predicted() -> None:
    assert not is_enough([]) and not is_enough([100.0] * (LEAST_ATTEMPTS - 1))
    assert is_enough([200.0, 101.0, 150.0, 100.0, 170.0]) and not is_enough([100.0, 103.0, 120.0, 130.0, 140.0])
    # Slow ones that agree do not count when a faster one comes.
    assert not is_enough([100.0, 101.0, 102.0, 103.0, 90.0])
    assert is_enough([100.0 + 10.0 * i for i in range(MOST_ATTEMPTS)])


def is_off(row: dict[str, Any]) -> bool:
    """Whether an exchange took more or less than it may."""
    return abs(row["deviation"]) > TOLERANCE


def off(row: dict[str, Any]) -> str:
    """One row of a failure's message."""
    return f"{row['layout']}, {row['tokens']} tokens: {row['predicted_us']:.0f}/{row['measured_us']:.0f} us"


def rows_on_link(hosts: Hosts, mbit: int, seconds: float) -> dict[str, Any]:
    """Measure a link, then exchange on it in every layout and size."""
    steady_tcp(hosts)
    rows = []
    with shaped(hosts, mbit), delayed(hosts, seconds), LinkedRanks(hosts) as ranks:
        topology = ranks.probe()
        for size in SIZES:
            for lookup in lookups(size * mbit // 100):
                attempts: list[Timed] = []
                while not is_enough([timed.total_us for timed in attempts]):
                    attempts.append(ranks.exchange(lookup, topology, repeats=1))
                check_bytes(lookup, fastest(attempts))
                rows.append(row_of(lookup, attempts))
    return {"mbit": mbit, "delay_us": seconds * 1e6, "probed": asdict(topology), "rows": rows}


def is_enough(totals_us: list[float]) -> bool:
    """Whether no more attempts are made: the two fastest agree, or there are as many as there may be."""
    if len(totals_us) < LEAST_ATTEMPTS:
        return False
    first, second = sorted(totals_us)[:2]
    return second <= first * (1.0 + AGREEMENT) or len(totals_us) == MOST_ATTEMPTS


def fastest(attempts: list[Timed]) -> Timed:
    """The attempt that the machine disturbed least."""
    return min(attempts, key=lambda timed: timed.total_us)


def row_of(lookup: Lookup, attempts: list[Timed]) -> dict[str, Any]:
    """One exchange in the results."""
    timed = fastest(attempts)
    predicted_us = sum(timed.predicted_us.values())
    assert timed.predicted_us.keys() == timed.measured_us.keys()
    return {
        "layout": lookup.name,
        "tokens": sum(lookup.token_counts),
        "predicted_us": predicted_us,
        "measured_us": timed.total_us,
        "deviation": predicted_us / timed.total_us - 1.0,
        "attempts_us": [attempt.total_us for attempt in attempts],
        "predicted_by_phase_us": timed.predicted_us,
        "measured_by_phase_us": timed.measured_us,
        "interface_bytes": timed.interface_bytes,
    }


def check_bytes(lookup: Lookup, timed: Timed) -> None:
    """What was timed is what is predicted: the ledger's bytes by rank and phase, the interface's but for headers."""
    given = {"reads": lookup.reads, "value_bytes": 4, "hops": lookup.hops}
    owned, counts = timed.owned, list(lookup.token_counts)
    for rank, sent in enumerate(timed.sent_bytes):
        expected = asdict(exchange_bytes(lookup.plan, rank, owned, counts, **given))
        assert sent == {phase: count for phase, count in expected.items() if count}
    calls = exchange_calls(lookup.plan, owned, counts, **given)
    crossing = sum(int(call.sent_bytes[:RANKS_PER_HOST, RANKS_PER_HOST:].sum()) for call in calls)
    assert timed.interface_bytes >= crossing
    # In small exchanges the messages by which ranks meet before each collective count too.
    if sum(counts) > 3 * SIZES[-1]:
        assert timed.interface_bytes <= crossing * (1.0 + COUNTER_TOLERANCE)


def write_results(links: list[dict[str, Any]], folder: Path) -> Path:
    """Leave all figures in a file of today's; returns it."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "date": today,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tolerance": TOLERANCE,
        "ranks_per_host": RANKS_PER_HOST,
        "links": links,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"exchange-links-{today}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
