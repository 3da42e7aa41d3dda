"""Lines on the terminal, and numbers that cannot be written (mempar.runtime.metrics)."""

import errno
import os
from pathlib import Path

import pytest

from full_disk import full_disk
from mempar.errors import MemparError
from mempar.runtime.metrics import MetricsLog, Terminal, read_rows


def test_terminal_prints_a_line_as_it_is_when_it_looks_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    # Rich would leave out the first two and refuse the third.
    for line in (
        "resumed from [x], a:x:b",
        "[bold]rows[/bold] 3, 4 of memory.values",
        "closed by [/tmp/run]",
        "long " * 100,
    ):
        Terminal(total_steps=1, first_step=1, interval=1).say(line)
        assert capsys.readouterr().out == line + "\n"


def test_full_disk_is_told_of_when_a_row_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", first_step=0)
    log.write({"step": 1, "loss": 2.0})
    # Its thread must find nothing to write meanwhile.
    log._board.flush()
    said = r"metrics\.jsonl cannot be written \(File too large\); .* make room .* --resume\."
    with pytest.raises(MemparError, match=said), full_disk():
        log.write({"step": 2, "loss": 1.0})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0] == {"step": 1, "loss": 2.0}


def test_full_disk_is_told_of_when_the_log_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(MemparError, match=r"metrics\.jsonl cannot be written"), full_disk():
        MetricsLog(path, first_step=1)
    assert read_rows(path) == [{"step": 1}]


def test_failure_of_tensorboard_names_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path / "metrics.jsonl", first_step=0)
    # It writes in a thread and raises what happened there at a later call.
    monkeypatch.setattr(log._board, "add_scalar", refuse)
    with pytest.raises(MemparError, match=r"events\.out\.tfevents\* cannot be written \(No space left on device\)"):
        log.write({"step": 1, "loss": 2.0})
    log.close()
