"""The options of `mempar convert`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A checkpoints/step_XXXXXXXX directory, a Hugging Face model, or a DeepSpeed universal checkpoint.",
            show_default=False,
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.", show_default=False)],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="The layout, e.g. tp=2 mp=8 mp_rows=4; 1 where nothing is said. memory.KEY=VALUE adds memory layers "
            "to a model without any.",
        ),
    ] = None,
    form: Annotated[str, typer.Option("--to", help="mempar, hf or deepspeed.")] = "mempar",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the optimizers' state out; training begins anew.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Cast weights to float32, bf16 or float64, with --weights-only.", show_default=False)
    ] = "",
    max_memory: Annotated[str, typer.Option(help="That all workers together may take.")] = "4GiB",
    workers: Annotated[
        int | None, typer.Option(help="Jobs at a time; two a core by default.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that was interrupted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Turn a checkpoint into what another layout's ranks would have saved, or into another format and back.

    The optimizers' state comes along, but to Hugging Face, which has no place for it.

    It takes one machine, no GPU, and no more memory than is given; DST is there when it is whole.
    """
    from mempar.tools.convert import command

    command.convert(
        source,
        destination,
        assignments or [],
        form=form,
        weights_only=weights_only,
        dtype=dtype,
        max_memory=max_memory,
        workers=workers,
        resume=resume,
        dry_run=dry_run,
        say=typer.echo,
    )
