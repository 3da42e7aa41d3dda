"""Which layouts are worth a look: sizes of every dimension that a run and a number of ranks allow.

What no size could make better is left out from the start, so that the rest can be looked at one by one:

- tensor parallelism stays inside a node, and comes with sequence parallelism where the length allows: the same bytes
  travel, activations and the dense parts of memory layers are shared;
- context parallelism only while a rank keeps 8192 positions or more: it shortens what attention keeps, and sends keys;
- the distributed optimizer wherever it may be: it sends what a plain one sends and keeps less;
- micro-batches are powers of two (or the recipe's own) of at most 64k tokens.

What remains may still be refused by a run's own rules or not fit; search.py finds out.
"""

import math
from dataclasses import dataclass, replace

from mempar.runtime.config import RunConfig
from mempar.runtime.hardware import Hardware

# Least positions that a context-parallel rank keeps, and most tokens of a micro-batch.
_POSITIONS, _MICRO_BATCH_TOKENS = 8192, 1 << 16


@dataclass(frozen=True, kw_only=True, order=True)
class Skeleton:
    """A layout without the cut of its tables: names and values as in the config."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    micro_batch_size: int


@dataclass(frozen=True, kw_only=True, order=True)
class Grid:
    """A cut of the tables."""

    mp: int = 1
    mp_rows: int = 1
    mp_hops: int = 1


def skeletons(run: RunConfig, num_ranks: int, hardware: Hardware) -> list[Skeleton]:
    """Layouts of a run, the tables' cut and recomputation left open."""
    model, train = run.model, run.train
    found = []
    for tp in divisors(hardware.gpus_per_node):
        shared = [model.num_attention_heads, model.query_groups, model.ffn_hidden_size, model.vocab_multiple]
        if num_ranks % tp or any(size % tp for size in shared):
            continue
        for pp in divisors(model.num_layers):
            if num_ranks % (tp * pp):
                continue
            for cp in _context_sizes(run, num_ranks // (tp * pp), tp, hardware):
                dp = num_ranks // (tp * pp * cp)
                if dp > train.global_batch_size:
                    continue
                for ep in _expert_sizes(run, dp * cp):
                    found += [
                        Skeleton(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, micro_batch_size=size)
                        for vpp in (divisors(model.num_layers // pp) if pp > 1 else [1])
                        for size in _micro_batches(run, dp)
                    ]
    return found


def grids(run: RunConfig, num_ranks: int) -> list[Grid]:
    """Cuts of a run's tables over so many ranks of a pipeline stage; one without any where there are no tables."""
    if not run.memories:
        return [Grid()]
    tiles = min(-(-run.value_dim_of(memory) // memory.column_tile) for memory in run.memories.values())
    found = []
    for mp in divisors(num_ranks):
        for rows in divisors(mp):
            if mp // rows > tiles:
                continue
            found += [Grid(mp=mp, mp_rows=rows, mp_hops=hops) for hops in ((1, 2) if 1 < rows < mp else (1,))]
    return found


def laid_out(run: RunConfig, skeleton: Skeleton, grid: Grid, recompute: str) -> RunConfig:
    """The run in a layout.

    Raises:
        ConfigError: when the run's own rules refuse it.
    """
    # Sequences that do not divide stay whole; float64 has no distributed optimizer.
    sequences = skeleton.tp > 1 and run.train.seq_length // skeleton.cp % skeleton.tp == 0
    sizes = {
        "tp": skeleton.tp, "pp": skeleton.pp, "vpp": skeleton.vpp, "cp": skeleton.cp, "ep": skeleton.ep,
        "mp": grid.mp, "mp_rows": grid.mp_rows, "mp_hops": grid.mp_hops,
        "sequence_parallel": sequences, "distributed_optimizer": run.train.dtype != "float64",
    }  # fmt: skip
    train = replace(run.train, micro_batch_size=skeleton.micro_batch_size, recompute=recompute)
    return replace(run, parallel=replace(run.parallel, **sizes), train=train)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _context_sizes(run: RunConfig, most: int, tp: int, hardware: Hardware) -> list[int]:
    length = run.train.seq_length
    # The engine has context parallelism on GPUs alone.
    limit = length // _POSITIONS if hardware.gpu else 1
    allowed = [cp for cp in _powers_of_two(min(most, limit)) if cp == 1 or length // cp % (2 * tp) == 0]
    own = run.parallel.cp
    return sorted(cp for cp in {*allowed, own} if most % cp == 0)


def _expert_sizes(run: RunConfig, most: int) -> list[int]:
    if not run.moe.enabled:
        return [1]
    return [ep for ep in divisors(run.moe.num_experts) if most % ep == 0]


def _micro_batches(run: RunConfig, dp: int) -> list[int]:
    samples = max(1, run.train.global_batch_size // dp)
    most = min(samples, max(1, _MICRO_BATCH_TOKENS // run.train.seq_length))
    own = run.train.micro_batch_size
    return sorted({*_powers_of_two(most), *([own] if 0 < own <= samples else [])})


def _powers_of_two(most: int) -> list[int]:
    return [1 << place for place in range(max(1, most).bit_length())]
