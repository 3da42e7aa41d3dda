"""`mempar profile` as its users meet it: bad input, a profile of the smoke recipe, two of them compared."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import refusal, said_as
from mempar.errors import MemparError
from mempar.runtime.launch.heartbeat import read_signs
from mempar.runtime.profile.rank import REQUEST, WARM_UP_STEPS
from mempar.tools.profile import command
from mempar.tools.profile.predicted import PREDICTED
from mempar.tools.profile.report import Report, load_report, load_spans, save_report
from mempar.tools.profile.trace import TRACE
from test_cli import TINY
from test_profile_report import recordings_of
from test_profile_trace import SCHEMA
from trace_check import check_times, problems

MEMPAR = [sys.executable, "-c", "from mempar.cli import main; main()"]
MOST_COST = 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to profile"),
        (["smok", "--out", "new"], "did you mean smoke"),
        (["smoke"], "--out is missing"),
        (["smoke", "--steps", "0", "--out", "new"], "measures nothing"),
        (["smoke", "train.stps=3", "--out", "new"], "did you mean train.steps"),
        (["smoke", "train.profile_interval=-1", "--out", "new"], "train.profile_interval"),
        (["smoke", "--nproc", "3", "parallel.mp=2", "--out", "new"], "on 3 ranks"),
        (["smoke", "--out", "full"], "exists and is not an empty directory"),
        (["smoke", "--out", "full/file"], "exists and is not an empty directory"),
        (["smoke", "--out", "full/file/new"], "cannot be written"),
        (["smoke", "data.corpus=", "--out", "new"], "mempar prepare"),
        (["--diff", "full", "full"], "report.json cannot be read"),
        (["--diff", "full/file", "full/file"], "is damaged or something else"),
        (["smoke", "--diff", "full", "full"], "without RECIPE, --nproc or --out"),
        (["--nproc", "2", "--diff", "full", "full"], "without RECIPE, --nproc or --out"),
        (["--diff", "x" * 300, "full"], "cannot be read (File name too long)"),
        (["smoke", "--out", "x" * 300], "cannot be looked at (File name too long)"),
    ],
    ids=said_as,
)
def test_bad_input_gets_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("something of value\n")
    assert message in refusal("profile", *arguments)
    # Nothing is made, and nothing is lost.
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert Path("full/file").read_text() == "something of value\n"


def mempar(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MEMPAR, *arguments], check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_profile_of_the_smoke_recipe(tmp_path: Path, note_figure) -> None:
    out = tmp_path / "profile"
    done = mempar("profile", "smoke", "parallel.mp=2", "--nproc", "2", "--steps", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "report.html",
        "report.json",
        "spans.json",
        "trace.json",
    ]
    # Where the ranks ran nothing is left.
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    report = load_report(out)
    assert (report.run.steps, report.run.world_size, report.run.tokens_per_step) == (1, 2, 24 * 128)
    assert {row.step for row in report.rows} == {WARM_UP_STEPS + 1}
    assert {row.layer for row in report.rows} == {-1, 1, 2, 3}
    for row in report.rows:
        assert row.bytes_predicted == (row.bytes_measured if row.phase in PREDICTED else None), row
    # Both ranks lie about half of the time in what is marked; the rest is megatron's.
    marked = sum(row.microseconds for row in report.rows) / 2e6
    assert 0.05 * report.run.seconds_per_step < marked <= 1.01 * report.run.seconds_per_step
    note_figure("share of a step that marks take", report.run.mark_cost_share)
    assert 0 < report.run.mark_cost_share <= MOST_COST
    assert {point.group for point in report.ceiling} >= {"mp", "dp"}
    reads = 3 * 24 * 128 * 32
    assert sum(table.rows_read for table in report.tables) == 2 * reads
    assert set(load_spans(out / report.spans)) == {0, 1}
    found = json.loads((out / TRACE).read_text())
    assert problems(found, SCHEMA) == []
    check_times(found)
    # Which phases take longest, and are listed, depends on the machine.
    assert "slowest rank" in done.stdout and "a step takes" in done.stdout and "fewer bytes than" in done.stdout
    compared = mempar("profile", "--diff", str(out), str(out / "report.json"))
    assert compared.returncode == 0 and "settings are the same" in compared.stdout, compared.stderr
    again = mempar("profile", "smoke", "--out", str(out))
    assert (again.returncode, again.stderr.count("exists and is not an empty directory")) == (2, 1)
    assert load_report(out) == report


def test_profile_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    command = [*MEMPAR, "profile", "smoke", *TINY, "--steps", "1000000", "--out", "profile"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "steps after one to warm up" in line:
                break
        os.kill(process.pid, signal.SIGTERM)
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "nothing is left" in said and "Traceback" not in said
    assert [*tmp_path.iterdir()] == []


def written_by(out: Path, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Profile ranks that have run; after the report something happens."""

    def save(report: Report, directory: Path) -> None:
        save_report(report, directory)
        then()

    monkeypatch.setattr(command, "with_data", lambda run, say: run)
    monkeypatch.setattr(command, "_record", lambda run, *settings: recordings_of(run))
    monkeypatch.setattr(command, "save_report", save)
    settings = [*TINY, "parallel.mp=2", "parallel.mp_rows=2"]
    command.profile("smoke", settings, num_ranks=2, num_steps=2, out=out, say=lambda line: None)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ended() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("then", "message"), [(full, "cannot be written .No space left"), (ended, "nothing is left")])
@pytest.mark.parametrize("empty", [False, True])
def test_profile_that_cannot_be_written_whole_is_not_written(
    then: Callable[[], None], message: str, empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "profile"
    if empty:
        out.mkdir()
    with pytest.raises(MemparError, match=message):
        written_by(out, monkeypatch, then)
    assert [path.name for path in tmp_path.rglob("*")] == (["profile"] if empty else [])


def test_profile_is_written_into_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "profile"
    out.mkdir()
    written_by(out, monkeypatch, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "report.html", "report.json", "spans.json", "trace.json")
    }
    assert load_report(out).run.world_size == 2


def test_profile_that_is_ended_in_its_steps_leaves_nothing(tmp_path: Path) -> None:
    arguments = ["profile", "smoke", *TINY, "--steps", "1000000", "--out", "profile"]
    with subprocess.Popen([*MEMPAR, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        until = time.monotonic() + 60
        while not any(sign.step > 2 for signs in tmp_path.glob(".profile.*/ranks") for sign in read_signs(signs)):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "the profile was ended by SIGTERM; nothing is left of it" in said and "Traceback" not in said
    assert [*tmp_path.iterdir()] == []


def test_request_is_no_name_of_a_run_directory() -> None:
    assert REQUEST not in ("config.yaml", "layout.json", "metrics.jsonl", "lock")
