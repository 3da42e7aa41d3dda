"""Refusing a run that does not fit its GPUs, with what to change."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.report import Estimate, estimate
from mempar.runtime.hardware import Gpu

# Kinds of bytes, and changes, that an error names.
_NAMED, _ADVISED = 3, 4
# A limit of records to try.
_DEPOSIT_BYTES = 4 << 30
# What is changed, in words, and how.
Change = tuple[str, Callable[[], RunConfig]]


def check_fits(run: RunConfig, num_ranks: int) -> Estimate:
    """Refuse a run that needs more memory than its `hardware.gpu` has; a run for CPUs is not judged.

    Args:
        run: the run.
        num_ranks: ranks that it is started on.

    Returns:
        The estimate.

    Raises:
        ConfigError: with the numbers, and the changes that would help most.
    """
    found = estimate(run, num_ranks)
    gpu = run.hardware.kind
    if gpu is None or found.fits(gpu):
        return found
    worst = found.worst
    place = f" of stage {found.worst_stage}" if run.parallel.pp > 1 else ""
    largest = sorted(worst.by_kind().items(), key=lambda item: -item[1])[:_NAMED]
    kinds = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in largest)
    changes = advice(found, gpu)
    raise ConfigError(
        f"the run needs {gib(worst.total)} a GPU on {num_ranks} ranks (a rank{place}: {kinds}, ...), but hardware.gpu="
        f"{run.hardware.gpu} has {gib(gpu.memory_bytes)}; all of a rank must fit at once; try {'; '.join(changes)}."
    )


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"


def advice(found: Estimate, gpu: Gpu) -> list[str]:
    """Changes that need less memory, each with what it would need, those that need least first."""
    tried: dict[str, int] = {}
    for words, change in [*_changes_of_layout(found.run, found.num_ranks), *_changes_of_tables(found.run)]:
        try:
            total = estimate(change(), found.num_ranks).worst.total
        except ConfigError:
            # Other sizes of the run do not allow it.
            continue
        if total < found.worst.total:
            tried[words] = total
    ranked = sorted(tried.items(), key=lambda item: item[1])[:_ADVISED]
    some = [
        f"{words} ({gib(total)}{'' if total <= gpu.memory_bytes else ', still too much'})" for words, total in ranked
    ]
    if ranked and ranked[0][1] <= gpu.memory_bytes:
        return some
    return [*some, "several of these together" if len(some) > 1 else "a smaller run", "more GPUs"]


def _changes_of_layout(run: RunConfig, num_ranks: int) -> Iterator[Change]:
    """The run with one setting of layout, batch or recomputation changed."""
    train, sizes = run.train, run.parallel
    if not sizes.distributed_optimizer:
        yield "parallel.distributed_optimizer=true", lambda: run.with_parallel(distributed_optimizer=True)
    wider = {"tp": 2 * sizes.tp, "sequence_parallel": True}
    yield f"parallel.tp={2 * sizes.tp} with parallel.sequence_parallel=true", lambda: run.with_parallel(**wider)
    if train.recompute != "full":
        yield "train.recompute=full", lambda: replace(run, train=replace(train, recompute="full"))
    half = train.micro_batch_size // 2
    if half:
        yield f"train.micro_batch_size={half}", lambda: replace(run, train=replace(train, micro_batch_size=half))
    if not run.memories:
        return
    if num_ranks // sizes.pp % (2 * sizes.mp) == 0:
        # Row shards stay row shards, columns columns, and a grid keeps its rows.
        rows = 2 * sizes.mp_rows if sizes.mp_rows == sizes.mp > 1 else sizes.mp_rows
        yield f"parallel.mp={2 * sizes.mp}", lambda: run.with_parallel(mp=2 * sizes.mp, mp_rows=rows)
    tiles = min(-(-run.value_dim_of(memory) // memory.column_tile) for memory in run.memories.values())
    fewest = next(rows for rows in range(1, sizes.mp + 1) if sizes.mp % rows == 0 and sizes.mp // rows <= tiles)
    if fewest != sizes.mp_rows:
        yield f"parallel.mp_rows={fewest}", lambda: run.with_parallel(mp_rows=fewest, mp_hops=1)


def _changes_of_tables(run: RunConfig) -> Iterator[Change]:
    """The run with one setting of its memories changed."""
    if not run.memories:
        return
    first = run.memory

    def changed(**settings: Any) -> Callable[[], RunConfig]:
        return lambda: replace(
            run,
            memory=replace(first, **settings),
            more_memories=tuple(replace(memory, **settings) for memory in run.more_memories),
        )

    if first.optimizer != "row_adagrad":
        yield "memory.optimizer=row_adagrad", changed(optimizer="row_adagrad", moments_dtype="float32")
    if first.optimizer == "row_adam" and first.moments_dtype != "bf16":
        yield "memory.moments_dtype=bf16", changed(moments_dtype="bf16")
    dtype = run.table_dtype_of(first)
    if dtype == "float32":
        yield "memory.dtype=bf16", changed(dtype="bf16")
    if dtype == "bf16" and first.rounding == "master":
        yield "memory.rounding=stochastic", changed(rounding="stochastic")
    if not first.deposit_bytes:
        yield f"memory.deposit_bytes={_DEPOSIT_BYTES}", changed(deposit_bytes=_DEPOSIT_BYTES)
