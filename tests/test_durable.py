"""What is renamed is on the disk before, and its name after; who uses it (mempar.runtime.durable)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from full_disk import full_disk
from mempar.runtime import durable
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.run_dir import open_existing, open_new
from mempar.tools.prepare.partial import Partial

Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is brought to the disk and what gets another name, in order."""
    calls: Calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        # An empty file that is on the disk is no use.
        assert os.fstat(descriptor).st_size
        calls.append(("fsync", path))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", note_fsync)
    monkeypatch.setattr(durable.os, "replace", note_replace)
    return calls


def in_order(path: Path) -> Calls:
    return [("fsync", f"{path}.aside"), ("replace", str(path)), ("fsync", str(path.parent))]


def test_replaced_file_is_on_the_disk_before_its_name(calls: Calls, tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"before")
    replace_file(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"
    assert calls == 2 * in_order(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_stays_when_its_replacement_cannot_be_written(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"before")
    with pytest.raises(OSError, match="File too large"), full_disk():
        replace_file(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"


def test_settings_of_a_run_outlast_a_crash(calls: Calls, tmp_path: Path) -> None:
    root = tmp_path / "run"
    open_new(root, RunConfig())
    assert calls == in_order(root / "config.yaml")
    open_existing(root, RunConfig())
    assert calls == 2 * in_order(root / "config.yaml")


def test_command_of_prepare_outlasts_a_crash(calls: Calls, tmp_path: Path) -> None:
    Partial(tmp_path / "data", {"inputs": []}, np.dtype(np.uint16)).close()
    path = tmp_path / "data.partial" / "command.json"
    assert calls == in_order(path)
    assert json.loads(path.read_text()) == {"inputs": []}
