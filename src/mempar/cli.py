"""The command line: `mempar --help`.

Commands import what they need when they run, so that help answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mempar import __version__
from mempar.errors import MemparError

app = typer.Typer(
    name="mempar",
    help="Pretrain language models with memory layers, on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mempar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain language models with memory layers, on megatron-core."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or module:function.")],
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.  [default: pp * lcm(tp*cp, mp)]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run.  [default: runs/NAME-TIME]", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, in this layout.")] = False,
    start_from: Annotated[
        Path | None, typer.Option("--from", help="Start a new run from a checkpoint of any layout.")
    ] = None,
) -> None:
    """Train a recipe on this machine. SIGTERM or ^C lets it save and end; a second ^C ends it at once."""
    from mempar.tools import train_command

    train_command.train(
        recipe,
        assignments or [],
        num_ranks=nproc,
        out=out,
        resume=resume,
        start_from=start_from,
        say=typer.echo,
    )


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoints/step_XXXXXXXX directory.")],
    other: Annotated[Path | None, typer.Argument(help="Another one, of any layout, to compare it with.")] = None,
) -> None:
    """Check that a checkpoint is whole, or that two hold the same weights and optimizer state.

    Ends with status 1 when something is damaged or the two differ.
    """
    from mempar.tools.verify import verify as verify_checkpoint

    verify_checkpoint(checkpoint, other, typer.echo)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's resolved config.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the recipes with their sizes, or print one."""
    from mempar.tools import recipe_list

    typer.echo(recipe_list.show(name, as_json=as_json))


def main() -> None:
    """Run the command line; bad input ends with one message and status 2."""
    try:
        app()
    except MemparError as error:
        typer.echo(f"mempar: {error}", err=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        typer.echo("mempar: interrupted", err=True)
        sys.exit(130)
