"""The command line, run in this process: what a command says, and that bad input is refused as it should be."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest.mock import patch

import pytest

from mempar import cli


class Said(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def mempar(*arguments: str) -> Said:
    """Run `mempar ARGUMENTS...`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["mempar", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refusal(*arguments: str) -> str:
    """The one message with which `mempar ARGUMENTS...` refuses bad input, with status 2.

    What was said before it on standard output (a corpus is there) may stay.
    """
    said = mempar(*arguments)
    assert said.status == 2, said
    assert said.err.startswith("mempar: ") and said.err.count("\n") == 1 and "Traceback" not in said.err, said
    return said.err


def said_as(value: object) -> str:
    """A test's name from its list of arguments; its other parameters are left out."""
    return " ".join(map(str, value)) if isinstance(value, list) else ""
