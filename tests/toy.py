"""Toy runs: small models on random tokens, trained in the pool's ranks and observed in logical terms.

`toy_run` makes a configuration, `train` runs it on one rank (every rank of the world calls it) and
returns what that rank saw, `joined` puts the ranks' views together: losses and norms, gradients and
parameters under their global names at their whole shapes, the table's gradient as `[S, D]`, the slots
that were read. Nothing of the engine is changed for it: `Watched` overrides the optimizers' last step.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import interpreted
from mempar.memory.config import MemoryConfig
from mempar.runtime import bringup, mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import KernelsConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.data.samples import Batch, micro_batches
from mempar.runtime.logical import LogicalParameter, logical_parameters, own_parameters
from mempar.runtime.model import Model, build_model
from mempar.runtime.moe_config import MoeConfig
from mempar.runtime.optim import Optimizers, RowGradient, StepReport
from mempar.runtime.schedule import LrFactors, full_rates
from mempar.runtime.slot_trace import SlotTrace, SlotTracer
from mempar.runtime.step import Stepper

VOCAB = 61
TABLE = "memory.values"
DATA_SEED = 11


def toy_run(
    *,
    kind: str = "memory_plus",
    optimizer: str = "row_adam",
    tied: bool = False,
    ragged: bool = False,
    extras: bool = False,
    merge: str = "auto",
    memory: dict[str, Any] | None = None,
    dtype: str = "float32",
    micro_batches: int = 4,
    global_batch_size: int = 0,
    recompute: str = "none",
    recompute_modules: tuple[str, ...] = ("mlp",),
    experts: dict[str, Any] | None = None,
    **parallel: int | bool,
) -> RunConfig:
    """Make a toy configuration.

    Args:
        kind: `dense`, `memory`, `memory_plus` or `peer`; `beside` is memory_plus beside the FFN; `two` is a memory_plus
            and a smaller PEER memory in one model; `moe` has experts in blocks 1 to 3, `memory+moe`, `memory_plus+moe`
            and `peer+moe` a memory in blocks 1 and 3 and experts in the others.
        optimizer: of the table.
        tied: whether embeddings are tied.
        ragged: sizes that shards do not divide (S = 169, D = 29 or 32 in tiles of 5, odd sequences) with
            grouped queries, instead of sizes that 2, 3, 4 and 6 divide, with as many groups as heads.
        extras: query/key normalisation and the scalar gate.
        merge: `memory.merge_duplicates` of every memory; `auto` does not merge in tables as small as these.
        memory: more settings of every memory.
        dtype: of training.
        micro_batches: of the global batch, which has one or two samples in each.
        global_batch_size: samples of the global batch, whatever `micro_batches` says.
        recompute: what is computed again in backward.
        recompute_modules: of which parts, for `selective`.
        experts: settings of `moe` that differ from the toy's.
        parallel: sizes of the layout.
    """
    # Sequence parallelism cuts sequences into equal shares.
    odd_length = 14 if parallel.get("sequence_parallel") else 15
    settings = {"merge_duplicates": merge, **(memory or {})}
    return RunConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=32 if ragged else 24,
            num_attention_heads=4,
            num_query_groups=2 if ragged else 0,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
            vocab_multiple=16,
            tie_embeddings=tied,
            # Near 1 / sqrt(width). At the .02 of wide models the norms of so narrow a model magnify its rounding:
            # gradient norms in float32 came to differ by 1e-3 after 20 steps, where they now do by 5e-6 at most.
            init_std=0.1,
        ),
        memory=replace(toy_memory(kind, optimizer=optimizer, ragged=ragged, extras=extras), **settings),
        more_memories=() if kind != "two" else (replace(_second_memory(optimizer, ragged), **settings),),
        moe=toy_experts(kind, experts or {}),
        train=TrainConfig(
            dtype=dtype,
            seq_length=odd_length if ragged else 16,
            global_batch_size=global_batch_size or (1 if ragged else 2) * micro_batches,
            micro_batch_size=1 if ragged else 2,
            recompute=recompute,
            recompute_modules=recompute_modules,
        ),
        optim=OptimConfig(lr=3e-4),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        # Where kernels are interpreted, they are what is tested.
        kernels=KernelsConfig(backend="triton" if interpreted() else "auto"),
    )


def toy_memory(kind: str, *, optimizer: str, ragged: bool, extras: bool) -> MemoryConfig:
    """The memory of a toy run; arguments as in `toy_run`."""
    kind, _, moe = ("dense", "", "moe") if kind == "moe" else kind.partition("+")
    plus = kind in ("dense", "memory_plus", "beside", "two")
    return MemoryConfig(
        enabled=kind != "dense",
        variant="memory_plus" if plus else kind,
        # (1, 3) lie on one stage of pp=2 vpp=2, (1, 2, 3) never do.
        layers=(1, 2, 3) if plus and kind != "two" and not moe else (1, 3),
        beside=kind == "beside",
        num_subkeys=13 if ragged else 12,
        heads=2,
        top_k=4,
        key_dim=16,
        value_dim=29 if ragged and plus else 0,
        qk_norm=extras,
        scalar_gate=extras,
        optimizer=optimizer,
        column_tile=5 if ragged else 4,
    )


def toy_experts(kind: str, settings: dict[str, Any]) -> MoeConfig:
    """The experts of a toy run: all blocks but the first, or those without memory."""
    given = {"num_experts": 4 if kind.endswith("moe") else 0, "layers": (1, 2, 3) if kind == "moe" else ()}
    return MoeConfig(**{"ffn_hidden_size": 20, **given, **settings})


def _second_memory(optimizer: str, ragged: bool) -> MemoryConfig:
    """A smaller memory in block 2, on another stage than the first."""
    small = toy_memory("peer", optimizer=optimizer, ragged=ragged, extras=False)
    return replace(small, layers=(2,), num_subkeys=9, heads=3, top_k=3)


class RandomSamples:
    """Sample i is a function of i."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng([DATA_SEED, index]).integers(0, VOCAB, self.seq_length + 1)


def loss_mask(sample: int, seq_length: int) -> Tensor:
    """Mask of one sample: a fifth of the tokens is masked at random, and every seventh sample wholly."""
    if sample % 7 == 3:
        return torch.zeros(seq_length)
    return torch.from_numpy(np.random.default_rng([DATA_SEED, sample, 1]).random(seq_length) < 0.8).float()


def batches_of(
    run: RunConfig, step: int, *, dp_rank: int = 0, dp: int = 1, device: torch.device | None = None
) -> list[Batch]:
    """One data-parallel rank's micro-batches of a step; two global batches alternate."""
    count, length = run.train.global_batch_size, run.train.seq_length
    first = step % 2 * count
    plain = micro_batches(
        RandomSamples(run.train.seq_length),  # type: ignore[arg-type]
        run,
        first,
        count=count,
        dp_rank=dp_rank,
        dp=dp,
        device=device or torch.device("cpu"),
    )
    return [
        replace(
            batch,
            loss_mask=torch.stack(
                [
                    loss_mask(batch.sample_ids[place], length) if place < len(batch.sample_ids) else torch.zeros(length)
                    for place in range(run.train.micro_batch_size)
                ]
            ).to(batch.loss_mask.device),
        )
        for batch in plain
    ]


@dataclass
class Seen:
    """What one rank saw of a run.

    Attributes:
        reports: one a step.
        gradients: of the first step, unclipped, by global name and whole; of the parameters on this rank.
        parameters: the same, final values (initial ones before any step).
        shards: the parts of the tables on this rank, by the tables' names.
        row_gradients: of each table in the first step, as reduced over replicas and copies: touched rows `[U]` of the
            shard and their gradients `[U, D_j]`.
        tables: `[S_i, D_j]`, final values of the shards.
        trace: slots read by this rank.
        extra: what an observer noted.
        digests: of everything that several ranks hold alike, by name.
    """

    reports: list[StepReport] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    shards: dict[str, TableSlice] = field(default_factory=dict)
    row_gradients: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    trace: SlotTrace = field(default_factory=SlotTrace)
    extra: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


class Watched(Optimizers):
    """Notes the first step's gradients, after finalisation and before they are clipped and applied."""

    def __init__(self, run: RunConfig, world: World, model: Model, seen: Seen) -> None:
        super().__init__(run, world, model)
        self.seen, self.watching = seen, True

    def _apply(self, factors: LrFactors, report: StepReport, gradients: dict[str, RowGradient]) -> None:
        if self.watching:
            self.watching = False
            self.seen.gradients = whole_parameters(self.run, self.model, finalised_gradients(self.run, self.model))
            self.seen.row_gradients = {
                name: (rows.cpu().numpy().copy(), grads.cpu().numpy().copy())
                for name, (rows, grads) in gradients.items()
            }
        super()._apply(factors, report, gradients)


def finalised_gradients(run: RunConfig, model: Model) -> Callable[[LogicalParameter], Tensor]:
    """Return a function that gives the finished gradient of this rank's share of a parameter."""
    if not run.parallel.distributed_optimizer:
        return lambda logical: logical.param.main_grad.detach().clone()
    # The distributed optimizer reduces to shards of each bucket, one a data-parallel rank: gather them.
    whole: dict[Any, Tensor] = {}
    for chunk in model.wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            gathered = buffer.grad_data.clone()
            for bucket in buffer.buckets:
                group = (
                    bucket.data_parallel_group if hasattr(bucket, "data_parallel_group") else buffer.data_parallel_group
                )
                shards = [shard.clone() for shard in bucket.grad_data.chunk(dist.get_world_size(group))]
                dist.all_gather(shards, shards[dist.get_rank(group)].clone(), group=group)
                gathered[bucket.offset : bucket.offset + bucket.grad_data.numel()] = torch.cat(shards)
            for param, (start, end, _) in buffer.param_index_map.items():
                whole[param] = gathered[start:end].view(param.shape)
    return lambda logical: whole[logical.param]


def whole_parameters(
    run: RunConfig, model: Model, tensor_of: Callable[[LogicalParameter], Tensor]
) -> dict[str, np.ndarray]:
    """Join something of every parameter's shape over the tensor-parallel ranks, by global name."""
    tp, group = run.parallel.tp, mcore.parallel_state.get_tensor_model_parallel_group()
    found = {}
    for logical in own_parameters(model.chunks):
        share = tensor_of(logical).detach().contiguous()
        shares = [torch.empty_like(share) for _ in range(tp)]
        dist.all_gather(shares, share, group=group)
        if logical.dim is None:
            assert all(torch.equal(other, share) for other in shares), f"{logical.name} differs between tp ranks"
        whole = logical.join(shares)
        found[logical.name] = (whole.float() if whole.dtype == torch.bfloat16 else whole).cpu().numpy().copy()
    return found


def train(
    run: RunConfig,
    steps: int,
    replay: SlotTrace | None = None,
    keep: tuple[str, ...] = (),
    observe: Callable[["Session", Seen], None] | None = None,
) -> Seen:
    """Train on this rank; every rank of the process group calls it.

    Args:
        run: what to train.
        steps: number of steps; 0 builds the model and keeps its initial values.
        replay: slots to read instead of choosing.
        keep: `gradients` of the first step, final `parameters`, `slots`.
        observe: called with the built run and the record before the first step.
    """
    session = Session(run, replay)
    seen = session.seen
    session.optimizers.watching = "gradients" in keep
    if observe is not None:
        observe(session, seen)
    for step in range(steps):
        seen.reports.append(session.step(step))
    if "slots" in keep:
        seen.trace = session.tracer.recorded
    seen.shards = {table.name: table.shard.part for table in session.model.tables}
    if "parameters" in keep:
        seen.parameters = whole_parameters(run, session.model, lambda logical: logical.param)
        for table in session.model.tables:
            values = table.shard.values
            seen.tables[table.name] = values.to(readable(values)).cpu().numpy().copy()
    seen.digests = digests(session)
    bringup.tear_down(session.world)
    return seen


class Session:
    """A run built on this rank: world, model, optimizers and stepper."""

    def __init__(self, run: RunConfig, replay: SlotTrace | None = None) -> None:
        self.run = run
        self.seen = Seen()
        self.world = bringup.lay_out(run)
        self.model = build_model(run, self.world, VOCAB)
        self.optimizers = Watched(run, self.world, self.model, self.seen)
        self.stepper = Stepper(run, self.world, self.model, self.optimizers)
        self.grid = self.world.placement.grid
        self.tracer = SlotTracer.for_run(self.stepper, self.grid.tp_rank(self.world.rank), replay)
        self.model.hook_slots(self.tracer)

    def step(self, step: int) -> StepReport:
        self.tracer.step = step
        dp_rank, device = self.grid.dp_rank(self.world.rank), self.world.device
        batches = batches_of(self.run, step, dp_rank=dp_rank, dp=self.grid.dp, device=device)
        return self.stepper.train(batches, full_rates(self.run))


def readable(tensor: Tensor) -> torch.dtype:
    """The dtype in which numpy can hold a tensor."""
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype


def digests(session: Session) -> dict[str, str]:
    """Digest what other ranks must hold bit for bit alike: data-parallel copies, tied embeddings, shard copies."""
    found = {}
    tp_rank, ep_rank = (of(session.world.rank) for of in (session.grid.tp_rank, session.grid.expert_rank))
    for chunk in session.model.chunks:
        for logical in logical_parameters(chunk, tp=session.run.parallel.tp, tp_rank=tp_rank, ep_rank=ep_rank):
            place = "" if logical.dim is None else f" of tensor rank {tp_rank}"
            found[logical.name + place] = _digest(logical.param)
    for table in session.model.tables:
        found[f"{table.name} {table.shard.part}"] = _digest(table.shard.values)
        for name, state in session.optimizers.tables[table.name].state.items():
            found[f"{name} of {table.name} {table.shard.part}"] = _digest(state)
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().to(readable(tensor)).cpu().numpy().tobytes()).hexdigest()


@dataclass
class History:
    """What all ranks saw of a run, in logical terms; the attributes are those of `Seen`."""

    run: RunConfig
    reports: list[StepReport]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    trace: SlotTrace
    seen: list[Seen]


def joined(run: RunConfig, seen: list[Seen]) -> History:
    """Put the ranks' views together; what several ranks hold must be the same on all of them."""
    gradients: dict[str, np.ndarray] = {}
    parameters: dict[str, np.ndarray] = {}
    copies: dict[str, str] = {}
    trace = SlotTrace()
    for rank, view in enumerate(seen):
        assert view.reports == seen[0].reports, f"rank {rank} reports other numbers than rank 0"
        for name, digest in view.digests.items():
            assert copies.setdefault(name, digest) == digest, f"{name} on rank {rank} differs from its copies"
        for target, part in ((gradients, view.gradients), (parameters, view.parameters)):
            for name, value in part.items():
                if name in target:
                    np.testing.assert_array_equal(target[name], value, err_msg=f"{name} on rank {rank}")
                target[name] = value
        trace.merge(view.trace)
        for name, part in view.shards.items():
            columns = slice(part.column_start, part.column_end)
            if name in view.row_gradients:
                rows, grad = view.row_gradients[name]
                whole = gradients.setdefault(name, np.zeros((part.num_slots, part.value_dim), grad.dtype))
                whole[rows + part.row_start, columns] = grad
            if name in view.tables:
                values = view.tables[name]
                whole = parameters.setdefault(name, np.zeros((part.num_slots, part.value_dim), values.dtype))
                whole[part.row_start : part.row_end, columns] = values
    assert not trace.unrecorded()
    return History(run, seen[0].reports, gradients, parameters, trace, seen)
