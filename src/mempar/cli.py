"""The command line: `mempar --help`.

Commands import what they need when they run, so that help answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mempar import __version__
from mempar.errors import MemparError
from mempar.tools.convert.options import convert
from mempar.tools.doctor.options import doctor
from mempar.tools.evaluate.options import evaluate
from mempar.tools.generate.options import generate
from mempar.tools.inspection.options import inspect
from mempar.tools.launch.options import launch
from mempar.tools.options import Out, Overrides, Recipe, Resume, StartFrom
from mempar.tools.plan.options import plan
from mempar.tools.prepare.options import prepare
from mempar.tools.profile.options import profile
from mempar.tools.study.options import study

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


def train(
    recipe: Recipe,
    assignments: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.  \\[default: pp * lcm(tp*cp, mp)]", show_default=False)
    ] = None,
    out: Out = None,
    resume: Resume = False,
    start_from: StartFrom = None,
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


def verify(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run (its newest checkpoint), or a checkpoints/step_XXXXXXXX directory.")
    ],
    other: Annotated[Path | None, typer.Argument(help="Another one, of any layout, to compare it with.")] = None,
) -> None:
    """Check that a checkpoint is whole, or that two hold the same weights and optimizer state.

    Ends with status 1 when something is damaged or the two differ.
    """
    from mempar.tools.verify import verify as verify_checkpoint

    verify_checkpoint(checkpoint, other, typer.echo)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's resolved config.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="List the tiny twins too, which train on a CPU: NAME_tiny.")
    ] = False,
) -> None:
    """List the recipes with sizes, GPUs and layouts, or print one with every setting."""
    from mempar.tools import recipe_list

    typer.echo(recipe_list.show(name, as_json=as_json, tiny=tiny))


# In the order in which help lists them.
for _command in (train, launch, prepare, recipes, plan, profile, doctor, verify, convert):
    app.command()(_command)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.add_typer(study)


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
