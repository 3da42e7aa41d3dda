"""The options of `mempar inspect`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

# Windows of a text or samples of data that are read, and slots in each list, unless one asks for others.
_SAMPLES, _TOP = 32, 5


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's directory for its newest.")
    ],
    text: Annotated[
        list[str] | None, typer.Option(help="A text to read; again for one to compare it with.", show_default=False)
    ] = None,
    file: Annotated[list[Path] | None, typer.Option(help="The same from a file in UTF-8.", show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX", help="Prepared data to read samples of, in place of a text.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of data, or windows of a long text, that are read.")] = _SAMPLES,
    rows: Annotated[
        str, typer.Option(metavar="N|all", help="Look at norms of so many rows of each table.", show_default=False)
    ] = "",
    memory: Annotated[str, typer.Option(help="This memory alone.  \\[default: all]", show_default=False)] = "",
    top: Annotated[int, typer.Option(help="Slots of each token and each list that are shown.")] = _TOP,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for inspection.html, .png and .json, made if need be.", show_default=False),
    ] = None,
) -> None:
    """Show what is in the memories of a checkpoint: dead slots, norms of rows, and what texts read.

    Of any layout, in one process; tables are read in blocks or mapped, never loaded. Texts show entropies of heads and
    which slots each token reads; two texts, what they read in common and which of their slots lie near each other.
    """
    from mempar.tools.inspection import command
    from mempar.tools.inspection.texts import Asked

    texts = [Asked(kind="text", source=each) for each in text or ()]
    texts += [Asked(kind="file", source=str(each)) for each in file or ()]
    texts += [Asked(kind="data", source=each) for each in data or ()]
    request = command.Request(
        checkpoint=checkpoint,
        texts=tuple(texts),
        samples=samples,
        rows=rows,
        memory=memory,
        top=top,
        as_json=as_json,
        out=out,
    )
    command.inspect(request, typer.echo)
