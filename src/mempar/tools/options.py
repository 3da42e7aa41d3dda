"""Arguments and options that several commands take; imports nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or module:function.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, in this layout.")]
StartFrom = Annotated[Path | None, typer.Option("--from", help="Start a new run from a checkpoint of any layout.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory of the run.  \\[default: runs/NAME-TIME]", show_default=False)
]
Nodes = Annotated[
    int | None, typer.Option(help="How many.  \\[default: what the recipe is laid out for]", show_default=False)
]
Port = Annotated[
    int | None, typer.Option(help="Where nodes meet on the first one; a free one by default.", show_default=False)
]
Hostfile = Annotated[Path | None, typer.Option(help="With --on ssh: lines of `HOST slots=N`.", show_default=False)]
Profile = Annotated[
    Path | None, typer.Option(help="What the cluster needs to know of itself, in YAML.", show_default=False)
]
