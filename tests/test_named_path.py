"""Paths that users name: what lies there, nothing, or one message."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.runtime.named_path import is_directory, is_file, status_of


def test_files_and_directories_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert is_file(file, "--out") and not is_directory(file, "--out")
    assert is_directory(str(tmp_path), "--out") and not is_file(tmp_path, "--out")
    for nothing in (tmp_path / "nothing", file / "below", tmp_path / "\udcff"):
        assert status_of(nothing, "--out") is None
        assert not is_file(nothing, "--out") and not is_directory(nothing, "--out")


@pytest.mark.parametrize(
    ("name", "why"),
    [("x" * 300, "File name too long"), ("a\0b", "embedded null byte"), ("\ud800", "surrogates"), ("loop", "Too many")],
)
def test_names_that_cannot_be_are_one_message(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=f"--out .* cannot be looked at .*{why}") as raised:
        status_of(tmp_path / name, "--out")
    assert "\n" not in str(raised.value)


def test_closed_directories_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ConfigError, match=r"--file /closed/file cannot be looked at \(Permission denied\)"):
        is_file("/closed/file", "--file")
