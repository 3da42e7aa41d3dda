"""Comparing what several ranks must hold bit for bit alike.

Copies of a table shard (replicas, stage copies) apply the same update to the same numbers, and
data-parallel ranks the same step to the same dense parameters, as do tensor-parallel ranks to those that
are not split; nothing afterwards would notice if one of them went astray through a fault of a machine or of
this program. At an interval, digests are compared: of the values and optimizer state of each shard over its
copies, of dense parameters over the data-parallel and the tensor-parallel ranks. Eight bytes a tensor travel to
each copy; only where digests differ, more do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.dims import even_cuts
from mempar.errors import MemparError
from mempar.memory.digest import digest, digest_bands
from mempar.runtime import mcore
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import own_parameters
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers
from mempar.runtime.tables import Table

# Bands in which a differing row is looked for at a time: two rounds for a million rows.
_NUM_BANDS = 1024
# Differences in a message.
_NUM_NAMED = 5
# Given `[n] int64` of this rank, returns `[copies, n]` of all copies in group order.
Share = Callable[[Tensor], Tensor]


def check_copies(run: RunConfig, model: Model, optimizers: Optimizers, step: int, *, saving: bool = False) -> None:
    """Compare the copies whose turn it is after a step; every rank must call it.

    A table's turn comes at its memory's `check_interval`, that of dense parameters at `memory.check_interval`; and
    before each checkpoint (`saving`), of which every copy writes a part.

    Raises:
        MemparError: on every rank, naming ranks, tensors and the first row in which they differ.
    """
    due = {name for name, memory in run.memories.items() if is_due(memory.check_interval, step, saving)}
    dense_due = is_due(run.memory.check_interval, step, saving)
    if not due and not dense_due:
        return
    differences = _dense_differences(model) if dense_due else []
    for table in model.tables:
        if table.memory in due:
            differences += _table_differences(table, optimizers)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, differences)
    # Every member of a group tells the same.
    told = list(dict.fromkeys(text for texts in found for text in texts))
    if told:
        more = f"; and {len(told) - _NUM_NAMED} more" if len(told) > _NUM_NAMED else ""
        raise MemparError(
            f"copies differ after step {step}: {'; '.join(told[:_NUM_NAMED])}{more}. They are updated alike and must "
            "stay bit for bit equal: a device or its memory computed wrongly, or this is an error in mempar; check the "
            "machines of these ranks, and resume from a checkpoint written while the copies agreed."
        )


def is_due(interval: int, step: int, saving: bool = False) -> bool:
    """Whether something that happens every so many steps (0: never), and when saving, happens after this one."""
    return interval > 0 and (saving or step % interval == 0)


def _dense_differences(model: Model) -> list[str]:
    state = mcore.parallel_state
    parameters = list(own_parameters(model.chunks))
    # Megatron marks experts, which have a group of their own.
    everywhere = {logical.name: logical.param for logical in parameters if getattr(logical.param, "allreduce", True)}
    experts = {logical.name: logical.param for logical in parameters if logical.name not in everywhere}
    split = {logical.name for logical in parameters if logical.dim is not None}
    whole = {name: param for name, param in everywhere.items() if name not in split}
    return [
        *_over_group(everywhere, state.get_data_parallel_group(with_context_parallel=True)),
        *_over_group(whole, state.get_tensor_model_parallel_group()),
        *(_over_group(experts, state.get_expert_data_parallel_group()) if experts else []),
    ]


def _over_group(tensors: Mapping[str, Tensor], group: Any) -> list[str]:
    ranks = dist.get_process_group_ranks(group)

    def share(mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather(parts, mine, group=group)
        return torch.stack(parts)

    return _differences(tensors, ranks, share, "row", 0)


def _table_differences(table: Table, optimizers: Optimizers) -> list[str]:
    copies = table.copies
    if copies.process_group is None:
        return []

    def share(mine: Tensor) -> Tensor:
        return copies.share(mine, [len(mine)] * copies.size, "copy_check").view(copies.size, len(mine))

    tensors = {table.name: table.shard.values}
    tensors |= {f"{table.name}.{name}": tensor for name, tensor in optimizers.tables[table.name].state.items()}
    ranks = dist.get_process_group_ranks(copies.process_group)
    return _differences(tensors, ranks, share, "slot", table.shard.part.row_start)


def _differences(
    tensors: Mapping[str, Tensor], ranks: list[int], share: Share, row_name: str, first_row: int
) -> list[str]:
    """Compare named tensors over a group; all its members must call it."""
    if len(ranks) == 1 or not tensors:
        return []
    digests = share(torch.stack([digest(name, tensor) for name, tensor in tensors.items()]))
    texts = []
    for place, (name, tensor) in enumerate(tensors.items()):
        of_copies = digests[:, place].tolist()
        if len(set(of_copies)) > 1:
            row = first_row + _first_difference(name, tensor, share)
            parties: dict[int, list[int]] = {}
            for rank, number in zip(ranks, of_copies, strict=True):
                parties.setdefault(number, []).append(rank)
            # The largest party first, as it is probably right.
            listed = sorted(parties.values(), key=lambda party: (-len(party), party))
            texts.append(f"{name} from {row_name} {row} on, between ranks " + " and ".join(map(str, listed)))
    return texts


def _first_difference(name: str, tensor: Tensor, share: Share) -> int:
    """Find the first row, counted in the block, in which copies differ: bands of rows, ever narrower."""
    start, end = 0, len(tensor)
    while end - start > 1:
        cuts = [start + cut for cut in even_cuts(end - start, min(_NUM_BANDS, end - start))]
        bands = share(digest_bands(name, tensor, 0, 0, cuts))
        first = int((bands != bands[0]).any(0).nonzero()[0])
        start, end = cuts[first], cuts[first + 1]
    return start
