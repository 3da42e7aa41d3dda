"""Tables of a checkpoint in its own files: where their numbers lie, and whether they had better be loaded.

Files of tables are safetensors of plain rows, so they are mapped as they are, whatever cut wrote them. Sizes are
compared with the manifest before anything is mapped, because reading beyond the end of a file would end the process.
**Checksums are not**: that would read the whole table. `mempar verify` does.
"""

from dataclasses import replace

import torch

from mempar.dims import TableSlice
from mempar.kernels.dispatch import Backend
from mempar.memory.mapped import MappedBlock, MappedReader, MappedReaders, MappedTable
from mempar.runtime.checkpoint import shard_file
from mempar.runtime.checkpoint.boxes import Box, whole_box
from mempar.runtime.checkpoint.manifest import DTYPE_BYTES, Manifest, Piece, check_file, damaged, not_read
from mempar.runtime.checkpoint.reading import check_held
from mempar.runtime.config import RunConfig


def map_table(manifest: Manifest, name: str, shape: tuple[int, int]) -> MappedTable:
    """Map a table.

    Args:
        manifest: of the checkpoint.
        name: of the table.
        shape: that it must have.

    Raises:
        CheckpointError: when the checkpoint has no such table, its files are not what the manifest says, or they cannot
            be mapped.
    """
    check_table(manifest, name, shape)
    blocks: list[MappedBlock] = []
    for path in dict.fromkeys(path for path, _ in manifest.pieces_of(name)):
        if not path.endswith(shard_file.SUFFIX):
            raise damaged(manifest.root / path, f"it holds a part of the table {name}, but not as plain rows")
        check_file(manifest.root, manifest.files[path])
        blocks += _blocks(manifest, path, name)
    try:
        return MappedTable(blocks, getattr(torch, manifest.tensors[name].dtype))
    except OSError as error:
        raise not_read(manifest.root, error, f"the table {name}") from None
    except ValueError as error:
        raise damaged(manifest.root, f"the table {name} cannot be mapped ({error})") from None


def check_table(manifest: Manifest, name: str, shape: tuple[int, int]) -> None:
    """Check that a checkpoint has a table of this shape.

    Raises:
        CheckpointError: when it has none, or one of another shape.
    """
    record = manifest.tensors.get(name)
    # Of any type: what is read is converted.
    check_held(manifest, whole_box(name, record.dtype if record else "float32", shape))


def map_readers(manifest: Manifest, run: RunConfig, memory: str, backend: Backend) -> MappedReaders:
    """Readers of the mapped tables of a memory; see `map_table`."""
    config = run.memories[memory]
    shape = (config.num_slots, run.value_dim_of(config))
    return MappedReaders(
        **{name: MappedReader(map_table(manifest, f"{memory}.{name}", shape), backend) for name in config.table_names}
    )


def _blocks(manifest: Manifest, path: str, name: str) -> list[MappedBlock]:
    """What a file holds of a table; row blocks that follow each other are one."""
    blocks: list[MappedBlock] = []
    end = -1
    for piece in manifest.files[path].pieces:
        if piece.box is None or piece.box.name != name:
            continue
        _check_size(manifest, path, piece, piece.box)
        block = MappedBlock(path=manifest.root / path, start=piece.start, part=_part(piece.box))
        if blocks and piece.start == end and _goes_on(blocks[-1].part, block.part):
            joined = replace(blocks[-1].part, row_end=block.part.row_end)
            blocks[-1] = replace(blocks[-1], part=joined)
        else:
            blocks.append(block)
        end = piece.start + piece.num_bytes
    return blocks


def _goes_on(part: TableSlice, following: TableSlice) -> bool:
    """Whether a part consists of the same columns as another one, from the next row on."""
    columns = (part.column_start, part.column_end)
    return part.row_end == following.row_start and columns == (following.column_start, following.column_end)


def _check_size(manifest: Manifest, path: str, piece: Piece, box: Box) -> None:
    taken = box.num_elements * DTYPE_BYTES[box.dtype]
    if piece.num_bytes != taken or len(box.shape) != 2:
        raise damaged(
            manifest.root / path,
            f"the piece of {box.name} at byte {piece.start} has {piece.num_bytes} bytes, not {taken}",
        )


def _part(box: Box) -> TableSlice:
    return TableSlice(
        num_slots=box.shape[0],
        value_dim=box.shape[1],
        row_start=box.offset[0],
        row_end=box.offset[0] + box.sizes[0],
        column_start=box.offset[1],
        column_end=box.offset[1] + box.sizes[1],
    )
