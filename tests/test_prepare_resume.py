"""`mempar prepare` interrupted: called again it gives the same bytes; nothing that was there is overwritten."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mempar.errors import ConfigError, MemparError
from mempar.runtime.data.manifest import DataManifest
from mempar.tools.prepare import partial, reading
from mempar.tools.prepare.command import prepare
from toy_tokenizers import byte_level

SUFFIXES = ("bin", "idx", "json")
# The command line with small batches.
PROGRAM = """
import sys
from mempar import cli
from mempar.tools.prepare import reading
reading.BATCH_BYTES = reading.PIECE_BYTES = 1000
sys.argv[0] = "mempar"
cli.main()
"""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut batches and pieces often, so that little text has many of them."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 1000)
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)


@pytest.fixture
def sources(tmp_path: Path, rng: random.Random) -> list[Path]:
    """Lines, and a file that is one long document."""
    words = ["the", "memory", "rows", "日本", "of", "a", "table"]
    lines = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(300)]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    (tmp_path / "y.txt").write_text("\n".join(lines))
    return [tmp_path / "x.jsonl", tmp_path / "y.txt"]


def run(sources: list[Path], out: Path, said: list[str] | None = None, **options: Any) -> DataManifest:
    options = {"tokenizer": "byte", "workers": 1, **options}
    say = (lambda _: None) if said is None else said.append
    return prepare([str(path) for path in sources], out=out, say=say, **options)


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """End the command at the `moment`-th write, rename or removal, of which only half is done if it is a write."""
    left = [moment]
    write, rename = partial.Partial._write, os.replace

    def crashing_write(self: partial.Partial, name: str, content: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            write(self, name, content[: len(content) // 2])
            raise Crash
        write(self, name, content)

    def crashing_rename(*paths: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        rename(*paths)

    def crashing_removal(*_: Any, **__: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Crash

    monkeypatch.setattr(partial.Partial, "_write", crashing_write)
    monkeypatch.setattr(partial.os, "replace", crashing_rename)
    monkeypatch.setattr(partial.shutil, "rmtree", crashing_removal)


def test_a_crash_at_any_moment_changes_nothing(sources: list[Path], tmp_path: Path) -> None:
    run(sources, tmp_path / "whole")
    whole, moment, completed = contents(tmp_path / "whole"), 0, 0
    while not completed:
        out = tmp_path / f"out{moment}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, moment)
            try:
                run(sources, out)
                completed = 1
            except Crash:
                assert not Path(f"{out}.json").exists() or contents(out) == whole
        said: list[str] = []
        run(sources, out, said)
        assert contents(out) == whole, f"after a crash at {moment}"
        assert not Path(f"{out}.partial").exists()
        moment += 1 if moment < 5 else 7
    assert moment > 30


def test_crash_after_crash_comes_to_the_same_end(sources: list[Path], tmp_path: Path, rng: random.Random) -> None:
    run(sources, tmp_path / "whole")
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, rng.randrange(1, 12))
            try:
                run(sources, tmp_path / "out")
            except Crash:
                continue
        break
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tokens", "lengths", "journal"])
@pytest.mark.parametrize("damage", ["cut", "changed", "longer"])
def test_damage_in_what_was_done_is_found_and_done_again(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    run(sources, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 30)
        with pytest.raises(Crash):
            run(sources, tmp_path / "out")
    path = tmp_path / "out.partial" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "cut":
        del content[middle:]
    elif damage == "changed":
        content[middle] ^= 1
    else:
        content += b"more"
    path.write_bytes(content)
    run(sources, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def start(sources: list[Path], out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["prepare", *map(str, sources), "--out", str(out), *more]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def test_killed_command_leaves_no_process_and_goes_on(tmp_path: Path, sources: list[Path]) -> None:
    sources[1].write_text(sources[1].read_text() * 60)
    spec = f"hf:{byte_level(tmp_path / 'hf')}"
    journal = tmp_path / "out.partial" / "journal"
    deadline = time.monotonic() + 60
    with start(sources, tmp_path / "out", "--tokenizer", spec, "--workers", "2") as command:
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        workers = psutil.Process(command.pid).children(recursive=True)
        command.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=5)[1], "workers outlived the command"
    assert journal.exists() and not (tmp_path / "out.bin").exists()
    with start(sources, tmp_path / "out", "--tokenizer", spec, "--workers", "1") as again:
        said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "going on after" in said
    run(sources, tmp_path / "whole", tokenizer=spec)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_worker_ends_the_command_with_one_message(tmp_path: Path, sources: list[Path]) -> None:
    from mempar.tools.prepare import encoding

    pool = encoding.ProcessPoolExecutor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "ProcessPoolExecutor", lambda *_, **options: pool(**{**options, "initializer": _die}))
        with pytest.raises(MemparError, match=r"a worker was killed.*--workers"):
            run(sources, tmp_path / "out", workers=2)
    run(sources, tmp_path / "out", workers=1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_finished_result_is_left_alone_when_nothing_changed(sources: list[Path], tmp_path: Path) -> None:
    run(sources, tmp_path / "out")
    times = [Path(f"{tmp_path}/out.{suffix}").stat().st_mtime_ns for suffix in SUFFIXES]
    said: list[str] = []
    run(sources, tmp_path / "out", said)
    assert "is up to date" in said[0] and len(said) == 1
    assert times == [Path(f"{tmp_path}/out.{suffix}").stat().st_mtime_ns for suffix in SUFFIXES]


def test_other_results_and_foreign_files_are_not_overwritten(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"other options"):
        run(sources, out, unit="line")
    with pytest.raises(ConfigError, match=r"other inputs"):
        run(sources[:1], out)
    with pytest.raises(ConfigError, match=r"other tokenizer"):
        run(sources, out, tokenizer=f"hf:{byte_level(tmp_path / 'hf')}")
    os.utime(sources[0], ns=(1, 1))
    with pytest.raises(ConfigError, match=r"other inputs"):
        run(sources, out)
    assert contents(out) == before
    (tmp_path / "mine.idx").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"mine\.idx exists.*nothing describes it"):
        run(sources, tmp_path / "mine")
    assert (tmp_path / "mine.idx").read_bytes() == b"mine"
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_result_is_not_taken_for_whole(sources: list[Path], tmp_path: Path) -> None:
    run(sources, tmp_path / "out")
    os.truncate(tmp_path / "out.bin", 100)
    with pytest.raises(ConfigError, match=r"out\.bin has not the size"):
        run(sources, tmp_path / "out")


def test_beginning_of_another_command_is_refused(sources: list[Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 10)
        with pytest.raises(Crash):
            run(sources, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"beginning of another command: options differ"):
        run(sources, tmp_path / "out", unit="line")
    with pytest.raises(ConfigError, match=r"beginning of another command: inputs differ"):
        run(sources[::-1], tmp_path / "out")
    run(sources, tmp_path / "out")


def test_two_commands_at_once_are_refused(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"being written by another command"):
            run(sources, tmp_path / "out")
    run(sources, tmp_path / "out")


def test_skipping_is_repeated_when_documents_were_skipped(tmp_path: Path, sources: list[Path]) -> None:
    sources[0].write_text("{\n" + sources[0].read_text())
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 12)
        with pytest.raises(Crash):
            run(sources, tmp_path / "out", skip_bad=True)
    with pytest.raises(ConfigError, match=r"has left out 1 bad documents"):
        run(sources, tmp_path / "out")
    assert run(sources, tmp_path / "out", skip_bad=True).skipped["bad"] == 1


def test_unwritable_place_is_refused(tmp_path: Path, sources: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(sources, tmp_path / "file" / "out")
