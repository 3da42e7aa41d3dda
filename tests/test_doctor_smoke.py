"""Collectives tried out: what reports mean, and ranks that hang (mempar.tools.doctor smoke, smoke_rank)."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mempar.tools.doctor import smoke
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.smoke import Outcome, ended_in
from mempar.tools.doctor.smoke_rank import STAGES, Report, read_reports, sent

TESTS = Path(__file__).parent

# As torchrun prints it: rank 3 lost its connection, rank 0 was ended, rank 2 is what began it.
SUMMARY = """\
Failures:
[1]:
  rank      : 3 (local_rank: 3)
  exitcode  : 1 (pid: 14048)
[2]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 14050)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  rank      : 2 (local_rank: 2)
  exitcode  : {status} (pid: 14049)
"""


def report(rank: int, stage: str = "done", **others: object) -> Report:
    seconds = {"all_reduce": 0.01, "all_to_all": 0.005}
    said = {"backend": "nccl", "seconds": seconds, "num_bytes": 1 << 28, "uncertainty": 1e-3, **others}
    return Report(rank=rank, world=4, host=f"node{rank // 2}", stage=stage, **said)  # type: ignore[arg-type]


def judged(*reports: Report, status: int | None = 1, output: str = "", link: float | None = None) -> Finding:
    said = Outcome(
        num_ranks=4, reports=list(reports), status=status, output=output, ended=ended_in(output), seconds=7.0
    )
    found = smoke.judge(said, link)
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return found[0]


def all_at(stage: str, **others: object) -> list[Report]:
    return [report(rank, stage, **others) for rank in range(4)]


def test_collectives_that_work_are_measured() -> None:
    found = judged(*all_at("done"), status=0)
    assert found.level == "ok" and found.values["hosts"] == ["node0", "node1"]
    # Of 2^28 bytes a rank sends 3/2 in an all-reduce and 3/4 in an exchange.
    assert found.values["all_reduce_bytes_per_s"] == pytest.approx(1.5 * 2**28 / 0.01)
    assert found.values["all_to_all_bytes_per_s"] == pytest.approx(0.75 * 2**28 / 0.005)


def test_clocks_of_hosts_are_compared() -> None:
    reports = [*all_at("done")[:2], report(2, offset=-9.0), report(3, offset=-9.0)]
    outcome = Outcome(num_ranks=4, reports=reports, status=0)
    assert [one.level for one in smoke.judge(outcome)] == ["ok", "warning"]


def test_a_slow_link_between_gpus_is_told_of() -> None:
    on_one = [replace(one, host="node0") for one in all_at("done")]
    assert judged(*on_one, status=0, link=450.0).level == "warning"
    assert judged(*on_one, status=0, link=100.0).level == "ok"
    assert judged(*all_at("done"), status=0, link=450.0).level == "ok"


def test_wrong_numbers_are_an_error() -> None:
    found = judged(*all_at("done")[:3], report(3, wrong=["all_to_all_single torch.bfloat16"]))
    assert found.level == "error" and "rank 3 on node1: all_to_all_single torch.bfloat16" in found.what


def test_the_rank_that_failed_by_itself_is_named() -> None:
    lost = "RuntimeError: [gloo] Connection closed by peer"
    found = judged(report(0, "barrier", error=lost), report(1, "joining", error="OutOfMemoryError: CUDA"))
    assert found.level == "error" and found.values["ranks"] == [1] and "joining: OutOfMemoryError" in found.what
    assert "Connection closed" in judged(report(0, "barrier", error=lost), *all_at("barrier")[1:]).what


@pytest.mark.parametrize(("status", "how"), [(-11, "was killed by signal 11"), (3, "ended with status 3")])
def test_the_rank_that_died_is_told_from_those_that_were_ended(status: int, how: str) -> None:
    lost = "RuntimeError: Connection closed by peer"
    output = SUMMARY.format(status=status)
    found = judged(*all_at("all_reduce")[:3], report(3, "all_reduce", error=lost), output=output)
    assert f"rank 2 on node1 {how} in all_reduce" in found.what and found.values["ranks"] == [2]


def test_the_missing_rank_is_named() -> None:
    waiting = all_at("barrier", waited=True)
    absent = judged(*waiting[:3], status=None)
    assert absent.level == "error" and "rank 3 never started; 3 others wait in barrier" in absent.what
    behind = judged(*waiting[:3], report(3, "joining"), status=None)
    assert "rank 3 on node1 hangs in joining" in behind.what and behind.values["ranks"] == [3]
    # In the same stage, but it never said that it waited for anyone.
    silent = judged(*waiting[:3], report(3, "barrier"), status=None)
    assert silent.values["ranks"] == [3]
    together = judged(*waiting, status=None)
    assert together.values["ranks"] == [0, 1, 2, 3] and "all 4 ranks wait for each other" in together.what
    assert "NCCL_DEBUG" in together.remedy
    assert "torchrun ended with status 1: no such module" in judged(output="...\nno such module").what


def test_exchanges_are_uneven_and_partly_empty() -> None:
    parts = [[sent(sender, receiver) for receiver in range(4)] for sender in range(4)]
    assert 0 in parts[0] and len(set(parts[0])) > 1 and parts[0] != parts[1]


def test_reports_that_are_cut_short_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.json").write_text('{"rank": 0, "wor')
    (tmp_path / "rank_00001.json").write_text('{"rank": 1, "world": 2, "host": "a", "stage": "joining"}')
    assert [one.rank for one in read_reports(tmp_path)] == [1]


def test_a_rank_that_hangs_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    outcome = smoke.launch(2, patience=3.0, worker="hanging_rank")
    found = smoke.judge(outcome)[0]
    assert found.level == "error" and found.values["ranks"] == [1], (found, outcome.output)
    assert found.values["stages"]["0"] == "barrier" and STAGES.index(found.values["stages"]["1"]) < 2
    assert outcome.status is None or outcome.seconds < 25.0
    deadline = time.monotonic() + 5.0
    while left := [one for one in psutil.process_iter(["cmdline"]) if "hanging_rank" in (one.info["cmdline"] or ())]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
