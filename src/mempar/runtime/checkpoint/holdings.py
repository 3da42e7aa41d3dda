"""Which rank saves which part of which tensor, in any layout: what saving does, worked out without ranks.

Of parts that several ranks hold one rank saves all (dense parameters: the first of the copies), or each saves some row
blocks (tables). Integers alone: nothing here imports torch or megatron, whose own choice the dense part follows.
"""

import re
from dataclasses import replace

from mempar.dims import TableSlice, column_tiles, even_cuts
from mempar.errors import CheckpointError
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.checkpoint.boxes import Box, whole_box
from mempar.runtime.checkpoint.manifest import HISTORY, TensorRecord
from mempar.runtime.checkpoint.names import parameter_of
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import Placement, stage_of_layer

_BLOCK = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(.+)")
# Parameters of a block that are split over tensor-parallel ranks: the dimension, and matrices one after the other in it
# that are each split (gate and up projection).
_SPLIT = {
    "self_attention.linear_qkv.weight": (0, 1),
    "self_attention.linear_proj.weight": (1, 1),
    "mlp.linear_fc1.weight": (0, 2),
    "mlp.linear_fc2.weight": (1, 1),
}
_EXPERT_SPLIT = {"linear_fc1.weight": (1, 2), "linear_fc2.weight": (2, 1)}
_WHOLE = {
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.router.weight",
}
# Parameters of a memory layer; one beside the feed-forward network is `mlp.memory`.
_OF_MEMORY = re.compile(
    r"mlp\.(memory\.)?(keys|(query|gate_proj|output_proj|scalar_gate)\.(weight|bias)|(query|key)_norm\.weight)"
)
# What megatron keeps of a module that is no tensor: (module)._extra_state/shard_(place)_(of).
_OBJECT = re.compile(r"(.+)\._extra_state/shard_(\d+)_(\d+)")


def table_of(name: str, run: RunConfig) -> str | None:
    """The memory that a tensor belongs to; None for a dense one."""
    memory = name.partition(".")[0]
    return memory if memory in run.memories else None


def table_shares(name: str, record: TensorRecord, run: RunConfig, placement: Placement) -> dict[int, tuple[Box, int]]:
    """What each rank saves of a tensor that belongs to a table.

    Args:
        name: of the tensor: values, state, or when rows were read last.
        record: its dtype and shape.
        run: the resolved run.
        placement: its layout.

    Returns:
        By rank the part, of at least a row, and the rows of a block.
    """
    memory = table_of(name, run)
    assert memory is not None
    config, place = run.memories[memory], placement.memories[memory]
    rows = block_rows(run.value_dim_of(config), run.value_bytes_of(config), run.checkpoint.block_bytes)
    shares = {}
    for group in placement.grid.copy_groups(place.stages):
        part = place.plan.part_of(placement.grid.memory_rank(group[0]))
        box = _table_box(name, record, place.plan, part)
        for copy, rank in enumerate(group):
            share = saved_share(record.kind, part, box, copy, len(group), rows)
            if share is not None:
                shares[rank] = (share, rows)
    return shares


def block_rows(value_dim: int, value_bytes: int, block_bytes: int) -> int:
    """Rows of a block: as many whole rows of the table's values as fill it. All its state is cut at the same rows."""
    return max(1, block_bytes // (value_dim * value_bytes))


def saved_share(kind: str, part: TableSlice, box: Box, copy: int, num_copies: int, block_rows: int) -> Box | None:
    """The rows of a shard that one of those who hold copies of it saves: they share the row blocks evenly.

    Column shards hold the same history, so that the first of them saves it.
    """
    if kind == HISTORY and part.column_start > 0:
        return None
    start, end = box.offset[0], box.offset[0] + box.sizes[0]
    first_block, last_block = start // block_rows, -(-end // block_rows)
    cuts = even_cuts(last_block - first_block, num_copies)
    mine = [(first_block + cuts[copy + more]) * block_rows for more in (0, 1)]
    first, stop = max(start, mine[0]), min(end, mine[1])
    if first >= stop or not box.num_elements:
        return None
    return replace(box, offset=(first, *box.offset[1:]), sizes=(stop - first, *box.sizes[1:]))


def dense_shares(name: str, record: TensorRecord, run: RunConfig, grid: RankGrid) -> dict[int, list[Box]]:
    """What each rank saves of a dense parameter, or of its optimizer's state.

    Args:
        name: of the tensor.
        record: its dtype and shape.
        run: the resolved run.
        grid: its layout.

    Returns:
        Parts by rank.

    Raises:
        CheckpointError: when the model has no such tensor.
    """
    stage, rest = _place(name, parameter_of(name), run)
    first = stage * grid.stage_size
    _check_shape(name, record, rest, grid)
    whole = whole_box(name, record.dtype, record.shape)
    if expert := _EXPERT.fullmatch(rest):
        cuts = even_cuts(record.shape[0], grid.ep)
        dim, halves = _EXPERT_SPLIT[expert[1]]
        return {
            first + grid.tp * ep_rank + tp_rank: [
                share
                for number in range(cuts[ep_rank], cuts[ep_rank + 1])
                for share in _split(_narrow(whole, 0, number, 1), dim, halves, grid.tp, tp_rank)
            ]
            for ep_rank in range(grid.ep)
            for tp_rank in range(grid.tp)
        }
    if rest in _SPLIT:
        dim, halves = _SPLIT[rest]
        return {first + tp_rank: _split(whole, dim, halves, grid.tp, tp_rank) for tp_rank in range(grid.tp)}
    return {first: [whole]}


def object_rank(key: str, run: RunConfig, grid: RankGrid) -> int:
    """The rank that saves something of megatron's that is no tensor.

    Raises:
        CheckpointError: when the model has no such thing.
    """
    found = _OBJECT.fullmatch(key)
    if found is None:
        raise _unknown(key)
    stage, rest = _place(key, f"{found[1]}.weight", run)
    first = stage * grid.stage_size
    if not _EXPERT.fullmatch(rest):
        return first
    place, count = int(found[2]), int(found[3])
    if place >= count:
        raise _unknown(key)
    cuts = even_cuts(count, grid.ep)
    return first + grid.tp * next(rank for rank in range(grid.ep) if place < cuts[rank + 1])


def _place(name: str, parameter: str, run: RunConfig) -> tuple[int, str]:
    """The stage of a parameter, and its name within its block; an embedding is named as what is split as it is."""
    sizes = run.parallel
    if parameter == "embedding.word_embeddings.weight":
        return 0, "self_attention.linear_qkv.weight"
    if parameter == "output_layer.weight":
        return sizes.pp - 1, "self_attention.linear_qkv.weight"
    if parameter == "decoder.final_layernorm.weight":
        return sizes.pp - 1, ""
    block = _BLOCK.fullmatch(parameter)
    if block is None or int(block[1]) >= run.model.num_layers:
        raise _unknown(name)
    rest, expert = block[2], _EXPERT.fullmatch(block[2])
    known = expert[1] in _EXPERT_SPLIT if expert else rest in _SPLIT or rest in _WHOLE or _OF_MEMORY.fullmatch(rest)
    if not known:
        raise _unknown(name)
    return stage_of_layer(int(block[1]), num_layers=run.model.num_layers, pp=sizes.pp, vpp=sizes.vpp), rest


def _table_box(name: str, record: TensorRecord, plan: ShardPlan, part: TableSlice) -> Box:
    """A shard's part of values or of state as wide as they, of one number a tile, or of one number a row."""
    if len(record.shape) == 2 and record.shape[1] != plan.value_dim:
        part = column_tiles(part, plan.column_tile)
    offset, sizes = (part.row_start, part.column_start), (part.num_rows, part.num_columns)
    dims = len(record.shape)
    if record.shape != (part.num_slots, part.value_dim)[:dims] or not dims:
        raise CheckpointError(
            f"{name} is {list(record.shape)}, and the table {[plan.num_slots, plan.value_dim]}; what belongs to a "
            "table has its rows, and its columns or a number a tile; the checkpoint is not what its config.yaml says."
        )
    return Box(name=name, dtype=record.dtype, shape=record.shape, offset=offset[:dims], sizes=sizes[:dims])


def _check_shape(name: str, record: TensorRecord, rest: str, grid: RankGrid) -> None:
    """Refuse what cannot be split as a parameter of this name is."""
    expert = _EXPERT.fullmatch(rest)
    dim, halves = _EXPERT_SPLIT[expert[1]] if expert else _SPLIT.get(rest, (0, 0))
    fits = 0 not in record.shape and (not halves or len(record.shape) > dim)
    if not fits or (halves and record.shape[dim] % (halves * grid.tp)) or (expert and record.shape[0] % grid.ep):
        raise CheckpointError(
            f"{name} is {list(record.shape)}, which cannot be cut for tp={grid.tp}, ep={grid.ep}; a parameter is cut "
            "in equal parts; use sizes that divide it, if the checkpoint is what its config.yaml says."
        )


def _split(box: Box, dim: int, halves: int, parts: int, mine: int) -> list[Box]:
    """A part of a box for one of several ranks: of each of the matrices that lie in the dimension its share."""
    half = box.sizes[dim] // halves
    share = half // parts
    return [_narrow(box, dim, number * half + mine * share, share) for number in range(halves)]


def _narrow(box: Box, dim: int, start: int, size: int) -> Box:
    offset = tuple(at + start * (place == dim) for place, at in enumerate(box.offset))
    sizes = tuple(size if place == dim else of for place, of in enumerate(box.sizes))
    return replace(box, offset=offset, sizes=sizes)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is no tensor of a model that this version of mempar knows; what is not known cannot be cut for "
        "another layout; use the mempar that wrote the checkpoint, or --weights-only if it is a state."
    )
