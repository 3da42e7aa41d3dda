"""The options of `mempar prepare`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, or directories of files: text, JSON lines (.jsonl, .json, .ndjson) or Parquet, plain or .gz, "
            ".bz2, .xz, .zst.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="byte, hf:PATH_OR_NAME, sentencepiece:FILE or tiktoken:NAME_OR_FILE, as in data.tokenizer.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.", show_default=False)
    ],
    workers: Annotated[
        int | None, typer.Option(help="Processes that encode; one a core by default.", show_default=False)
    ] = None,
    documents: Annotated[
        str, typer.Option(help="A document of a text file is the whole file, a line or a paragraph.")
    ] = "file",
    field: Annotated[str, typer.Option(help="Key of JSON lines, or column of Parquet, that holds the text.")] = "text",
    form: Annotated[
        str | None, typer.Option("--format", help="text, jsonl or parquet; by the names of the files by default.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave documents out that are no text, and count them.")
    ] = False,
) -> None:
    """Turn text into the .bin/.idx files that data.paths name.

    Documents keep their order, each closed by the tokenizer's end-of-document token.

    Call an interrupted command again to go on where it stopped.
    """
    from mempar.tools.prepare import command

    command.prepare(
        inputs,
        tokenizer=tokenizer,
        out=out,
        workers=workers,
        form=form,
        unit=documents,
        field=field,
        skip_bad=skip_bad,
        say=typer.echo,
    )
