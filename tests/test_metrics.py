"""Lines on the terminal (mempar.runtime.metrics)."""

import pytest

from mempar.runtime.metrics import Terminal


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
