"""Refusing a run that does not fit its GPUs, with what to change."""

from dataclasses import replace

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.report import Estimate, estimate
from mempar.runtime.hardware import Gpu

# Kinds of bytes that an error names.
_NAMED = 3


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
    """Changes that need less memory, each with what it would leave, those that fit first."""
    tried: dict[str, int] = {}
    for words, run in _alternatives(found.run, found.num_ranks):
        try:
            total = estimate(run, found.num_ranks).worst.total
        except ConfigError:
            continue
        if total < found.worst.total:
            tried.setdefault(words, total)
    if not tried:
        return ["more GPUs, or a smaller model"]
    ranked = sorted(tried.items(), key=lambda item: item[1])
    some = [
        f"{words} ({gib(total)}{'' if total <= gpu.memory_bytes else ', still too much'})" for words, total in ranked
    ]
    enough = any(total <= gpu.memory_bytes for total in tried.values())
    return some if enough else [*some, "several of these together, or more GPUs"]


def _alternatives(run: RunConfig, num_ranks: int) -> list[tuple[str, RunConfig]]:
    """The run with one setting changed."""
    train, sizes, memory = run.train, run.parallel, run.memory
    found: list[tuple[str, RunConfig]] = []

    def with_memory(words: str, **settings: object) -> None:
        memories = [replace(each, **settings) for each in (memory, *run.more_memories)]
        found.append((words, replace(run, memory=memories[0], more_memories=tuple(memories[1:]))))

    if not sizes.distributed_optimizer and train.dtype != "float64":
        found.append(("parallel.distributed_optimizer=true", run.with_parallel(distributed_optimizer=True)))
    if train.recompute != "full":
        full = replace(run, train=replace(train, recompute="full"))
        found.append(("train.recompute=full", full))
    if train.micro_batch_size > 1:
        half = train.micro_batch_size // 2
        less = replace(run, train=replace(train, micro_batch_size=half))
        found.append((f"train.micro_batch_size={half}", less))
    if not memory.enabled:
        return found
    stage = num_ranks // sizes.pp
    if sizes.mp * 2 <= stage and stage % (sizes.mp * 2) == 0:
        # A grid keeps its rows; a table of row shards gets more of them.
        rows = sizes.mp_rows * 2 if sizes.mp_rows == sizes.mp > 1 else sizes.mp_rows
        found.append((f"parallel.mp={sizes.mp * 2}", run.with_parallel(mp=sizes.mp * 2, mp_rows=rows)))
    if sizes.mp_rows != 1 and sizes.mp > 1:
        found.append(("parallel.mp_rows=1", run.with_parallel(mp_rows=1, mp_hops=1)))
    if memory.optimizer != "row_adagrad":
        with_memory("memory.optimizer=row_adagrad", optimizer="row_adagrad", moments_dtype="float32")
    if memory.optimizer == "row_adam" and memory.moments_dtype != "bf16" and run.table_dtype_of(memory) != "float64":
        with_memory("memory.moments_dtype=bf16", moments_dtype="bf16")
    if run.table_dtype_of(memory) == "float32":
        with_memory("memory.dtype=bf16", dtype="bf16")
    if run.table_dtype_of(memory) == "bf16" and memory.rounding == "master":
        with_memory("memory.rounding=stochastic", rounding="stochastic")
    if not memory.deposit_bytes:
        with_memory("memory.deposit_bytes=4294967296", deposit_bytes=4 << 30)
    return found
