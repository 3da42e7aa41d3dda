"""Parquet files: one column of text, read by row groups and a few dozen rows at a time."""

from collections.abc import Iterator
from typing import Any

from mempar.errors import ConfigError
from mempar.tools.prepare.inputs import Input
from mempar.tools.prepare.segments import Position, Segment

ROWS_AT_A_TIME = 64


def parquet_segments(source: Input, here: Position, field: str) -> Iterator[tuple[Segment, Position, int]]:
    """Yield rows from a position on, each time with the position after them and the bytes of the file read, roughly.

    Raises:
        ConfigError: for a damaged file, and one without such a column of text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{source.path} is a Parquet file, and the package `pyarrow` is not installed; it comes with an extra; "
            "pip install 'mempar[data]'."
        ) from None
    try:
        # Not all of a row group at once: one may hold gigabytes.
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_column(pyarrow, source, file.schema_arrow, field)
            yield from _rows(source, file, here, field)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{source.path} cannot be read as Parquet: {reason}; the file is damaged or no Parquet file; fetch it "
            "again, or name its --format."
        ) from None


def _rows(source: Input, file: Any, here: Position, field: str) -> Iterator[tuple[Segment, Position, int]]:
    row, num_rows = 0, file.metadata.num_rows
    for group in range(file.metadata.num_row_groups):
        rows_in_group = file.metadata.row_group(group).num_rows
        if row + rows_in_group <= here.offset:
            row += rows_in_group
            continue
        for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=[field]):
            skipped = min(max(0, here.offset - row), batch.num_rows)
            texts = batch.column(0)[skipped:].to_pylist()
            first, row = row + skipped, row + batch.num_rows
            if texts:
                segment = Segment(path=str(source.path), form=source.form, line=first + 1, content=texts)
                yield segment, Position(here.file, row, row + 1), source.num_bytes * row // num_rows


def _check_column(pyarrow: Any, source: Input, schema: Any, field: str) -> None:
    if field not in schema.names:
        raise ConfigError(
            f"{source.path} has no column {field}; its columns are: {', '.join(schema.names)}; name the one that holds "
            "the text by --field."
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ConfigError(
            f"{source.path} has {kind} in column {field}; documents are read from a column of strings; name another "
            "one by --field."
        )
