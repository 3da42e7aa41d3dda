"""Progress bars: on terminals alone, with names as they are."""

import io
import sys

import pytest

from mempar.tools.bars import byte_bars, counting_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("make", "shown"), [(counting_bars, "7/8"), (byte_bars, "7/8 bytes")])
def test_bars_show_names_and_counts(make, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with make() as begin:
        advance = begin("data [of/me]", 8, 3)
        advance(4)
        begin("others", 2)
    said = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "data [of/me]" in said and shown in said and "others" in said


def test_bars_are_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with counting_bars() as begin:
        begin("data", 8)(8)
    assert capsys.readouterr() == ("", "")
