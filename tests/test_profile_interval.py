"""Marks in training: phases in metrics.jsonl at their interval, and nothing else changes."""

import dataclasses
from pathlib import Path

from mempar.marks import Span
from mempar.runtime.metrics import read_rows
from mempar.runtime.profile.interval import joined, phase_totals
from mempar.runtime.run_dir import RunDir
from rank_pool import RankPool
from test_train import paths, toy, train, until

__all__ = ["paths"]


def test_profiled_training_logs_phases_at_its_interval_and_resumes_bit_for_bit(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = until(toy(paths, mp=2, mp_rows=2), 4)
    profiled = dataclasses.replace(run, train=dataclasses.replace(run.train, profile_interval=2))
    plain = train(pool, run, tmp_path / "plain", ranks=2)
    rows = train(pool, profiled, tmp_path / "profiled", ranks=2)
    half = until(profiled, 2)
    train(pool, half, tmp_path / "resumed", ranks=2)
    resumed = train(pool, profiled, tmp_path / "resumed", ranks=2, resume=True)
    for row, other, again in zip(plain, rows, resumed, strict=True):
        for name, value in row.items():
            if name not in ("seconds", "tokens_per_s"):
                assert value == other[name] == again[name], name
        phases = {name for name in other if name.startswith("profile/")}
        assert phases == {name for name in again if name.startswith("profile/")}
        due = other.get("step", 1) % 2 == 0 and "loss" in other
        assert due == bool(phases)
        if due:
            assert other["profile/values_us"] > 0 and other["profile/query_backward_us"] > 0
            assert other["profile/values_bytes"] == again["profile/values_bytes"] > 0
            assert "profile/query_bytes" not in other
    logged = read_rows(RunDir(tmp_path / "resumed").metrics)
    assert [row["step"] for row in logged if "profile/values_us" in row] == [2, 4]


def test_totals_of_ranks_are_joined_by_the_longest_time_and_all_bytes() -> None:
    spans = [Span(1, 1, 0, "values", "mp", 0, 2_000, 2_000, 8, 16), Span(1, 2, 0, "values", "mp", 0, 1_000, 0, 4, 8)]
    totals = phase_totals([*spans, Span(1, 1, 0, "query", "", 0, 500)])
    assert totals == {"values": (3.0, 12), "query": (0.5, 0)}
    assert joined([totals, {"values": (5.0, 1)}, {}]) == {
        "profile/query_us": 0.5,
        "profile/values_bytes": 13,
        "profile/values_us": 5.0,
    }
