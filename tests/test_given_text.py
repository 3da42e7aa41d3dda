"""Texts that users give: read as they are, or one message."""

import io
import sys
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.tools.given_text import check_unicode, read_text


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("zwölf\r\nü\r".encode())
    assert read_text(path, "--file text") == ("zwölf\r\nü\r", True)
    assert read_text(path, "--file text", 3) == ("zwö", False)
    assert read_text(path, "--file text", 9) == ("zwölf\r\nü\r", True)


def test_standard_input_is_read_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größer\n".encode())))
    assert read_text(None, "--prompt-file -") == ("größer\n", True)
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "No such file or directory"),
        (".", "Is a directory"),
        ("latin", "it is not UTF-8"),
        ("cut", "it is not UTF-8"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_what_cannot_be_read_is_one_message(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Zwölf".encode("latin-1"))
    # In the middle of a character.
    (tmp_path / "cut").write_bytes("zwölf ü".encode()[:-1])
    with pytest.raises(ConfigError, match=rf"--file {name} cannot be read \({why}\); it is a text file"):
        read_text(tmp_path / name, f"--file {name}")


def test_arguments_that_are_no_text_are_refused() -> None:
    check_unicode("größer 🙂", "a prompt")
    with pytest.raises(ConfigError, match=r"a prompt is not UTF-8; .*iconv"):
        check_unicode("a\udcff", "a prompt")
