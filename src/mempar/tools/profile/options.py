"""The options of `mempar profile`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from mempar.errors import ConfigError
from mempar.tools.options import Overrides


def profile(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, a YAML file, or module:function.", show_default=False)
    ] = None,
    assignments: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.  \\[default: pp * lcm(tp*cp, mp)]", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="To measure, after one to warm up.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Directory to make.", show_default=False)] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Compare two profiles instead: directories, or report.json.", show_default=False
        ),
    ] = None,
) -> None:
    """Train a few steps with marks on, and say where the time went and what was sent.

    Writes report.json (every phase of every layer, step and rank: bytes predicted and measured, time, bandwidth,
    waiting), trace.json for ui.perfetto.dev and report.html, a page with plots, into --out.
    """
    if diff is not None:
        if recipe is not None or out is not None or nproc is not None:
            raise ConfigError(
                "--diff compares two profiles that are there; it stands without RECIPE, --nproc or --out; drop them."
            )
        from mempar.tools.profile.compare import compare

        compare(*diff, typer.echo)
        return
    if recipe is None:
        raise ConfigError("nothing to profile: a RECIPE, or --diff A B, is needed; `mempar recipes` lists recipes.")
    from mempar.tools.profile import command

    command.profile(recipe, assignments or [], num_ranks=nproc, num_steps=steps, out=out, say=typer.echo)
