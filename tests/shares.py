"""What the ranks of a layout save, by arithmetic alone, and what a checkpoint has in the files of each rank."""

import re

import torch

from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.boxes import Box, row_blocks
from mempar.runtime.checkpoint.holdings import dense_shares, object_rank, table_of, table_shares
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.placement import place


def boxes_written(manifest: Manifest) -> dict[str, set[Box | str]]:
    """The pieces of a checkpoint by the files that hold them, but for headers and descriptions."""
    found: dict[str, set[Box | str]] = {}
    for path, piece in manifest.pieces():
        if piece.box is not None or piece.key:
            assert found.setdefault(path, set()).isdisjoint({piece.box or piece.key})
            found[path].add(piece.box or piece.key)
    return found


def boxes_foreseen(manifest: Manifest, world_size: int) -> dict[str, set[Box | str]]:
    """The same by arithmetic alone, from names and shapes."""
    run = read_config(manifest)
    placement = place(run, world_size)
    found: dict[str, set[Box | str]] = {}
    for name, record in manifest.tensors.items():
        if table_of(name, run):
            for share, rows in table_shares(name, record, run, placement).values():
                found.setdefault(shard_file.path_of(share), set()).update(row_blocks(share, rows))
            continue
        for rank, shares in dense_shares(name, record, run, placement.grid).items():
            for share in shares:
                rows = torch_dist.rows_of(share, getattr(torch, share.dtype).itemsize, run.checkpoint.block_bytes)
                found.setdefault(torch_dist.path_of(rank), set()).update(row_blocks(share, rows))
    for _, piece in manifest.pieces():
        if piece.key:
            found[torch_dist.path_of(object_rank(piece.key, run, placement.grid))].add(piece.key)
    return found


def elements_of_ranks(found: dict[str, set[Box | str]]) -> dict[str, dict[str, int]]:
    """How many elements of each tensor lie in a rank's files, of which it may have several, and which objects."""
    counts: dict[str, dict[str, int]] = {}
    for path, boxes in found.items():
        of_rank = counts.setdefault(re.sub(r"_\d+\.distcp$", "", path), {})
        for box in boxes:
            name = box if isinstance(box, str) else box.name
            of_rank[name] = of_rank.get(name, 0) + (0 if isinstance(box, str) else box.num_elements)
    return counts


def lie_within(found: dict[str, set[Box | str]], foreseen: dict[str, set[Box | str]]) -> bool:
    """Whether every dense part in a rank's files is of what the rank saves."""
    of_rank: dict[str, set[Box]] = {}
    for path, boxes in foreseen.items():
        of_rank[path] = {box for box in boxes if isinstance(box, Box)}
    for path, boxes in found.items():
        own = of_rank.get(re.sub(r"_\d+\.distcp$", "_0.distcp", path), set())
        for box in boxes:
            if isinstance(box, Box):
                inside = sum(
                    torch.empty(0).new_empty(box.sizes, device="meta")[meeting[0]].numel()
                    for other in own
                    if other.name == box.name and (meeting := box.overlap(other)) is not None
                )
                if inside != box.num_elements:
                    return False
    return True
