"""The options of `mempar study`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from mempar.errors import ConfigError

study = typer.Typer(name="study", help="Experiments that show what memory is good for.", no_args_is_help=True)


@study.callback()
def _root() -> None:
    """Experiments that show what memory is good for."""


@study.command()
def recall(
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the study, e.g. steps=500.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in about ten minutes on two cores.")] = False,
    size: Annotated[str, typer.Option(help="quick, full or large (for a GPU).  \\[default: full]")] = "",
    variants: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Models: dense, dense_2x, moe, peer, memory, memory_plus.", show_default=False
        ),
    ] = "",
    slots: Annotated[
        str,
        typer.Option(metavar="N,M", help="Tables of memory_plus.  \\[default: the size's]", show_default=False),
    ] = "",
    seeds: Annotated[
        int | None, typer.Option(help="Of each model.  \\[default: the size's]", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time.  \\[default: one a core]", show_default=False)
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the checkpoint of every run.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The study's directory.  \\[default: runs/recall-SIZE]", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run nothing: draw the page again from DIR/results.json.", show_default=False),
    ] = None,
) -> None:
    """Train models of equal compute on facts of the Unicode database, and ask them for these in other words.

    The same command goes on where it was interrupted; runs that are done are not done again.
    """
    from mempar.tools.study import command

    if report is not None:
        if any((assignments, quick, size, variants, slots, seeds is not None, jobs is not None, keep_models, out)):
            raise ConfigError(f"--report {report} with other options: it runs nothing; give it alone.")
        command.report(report, typer.echo)
        return
    if quick and size not in ("", "quick"):
        raise ConfigError(f"--quick with --size {size}: it stands for --size quick; drop one of them.")
    request = command.Request(
        size="quick" if quick else size or "full",
        given=tuple(assignments or ()),
        variants=tuple(name.strip() for name in variants.split(",")) if variants else (),
        slots=_numbers(slots),
        num_seeds=seeds,
        jobs=jobs,
        keep_models=keep_models,
        out=out,
    )
    command.recall(request, typer.echo)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--slots {text}: these are no numbers; give them with commas, e.g. 1024,16384.") from None
