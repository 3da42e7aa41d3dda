"""The command line's arguments and options: all are explained, and what commands share is one text."""

from typing import get_args

import typer
from typer.main import get_command

from mempar import cli
from mempar.tools import options


def test_every_argument_and_option_is_explained() -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 9
    unexplained = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert not unexplained and all(command.help for command in commands.values())


def test_shared_options_are_explained_where_they_are_defined() -> None:
    shared = {name: get_args(value)[1] for name, value in vars(options).items() if get_args(value)}
    assert {"Recipe", "Overrides", "Resume", "StartFrom", "Out", "Hostfile"} <= shared.keys()
    for name, given in shared.items():
        assert isinstance(given, typer.models.ParameterInfo) and given.help, name
