"""How long a rank computes: phase by phase of a block, the output layer, and what follows the last micro-batch.

Closed forms in the sizes of a layout and a hardware description (roofline.py); no communication, no waiting, no
recomputation (`is_recomputed` says what runs again). Numbers of passes over memory are counted in the engine's code,
which fuses norms, attention and what memory layers do, but neither SwiGLU nor RoPE (runtime/model.py). Entries are
spread evenly over row shards. The backward pass of a product is two products of its size; what it makes of each
parameter is then added to the gradients of the step (`gradient_sums`), for the engine does not fuse the two.
"""

from dataclasses import dataclass

from mempar.memory.config import MemoryConfig
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.layout import DTYPE_BYTES, Chunk, Layout
from mempar.runtime.estimate.parameters import parameters_of
from mempar.runtime.estimate.tables import deposits_of_lookup, looked_up
from mempar.runtime.hardware import Hardware
from mempar.runtime.placement import MemoryPlacement
from mempar.runtime.train_config import TrainConfig
from mempar.tools.plan.roofline import Roofline

# Reads and writes of a number, forward and backward: a norm and a residual sum, twice a block; RoPE; SwiGLU; the gate
# of Memory+ (runtime/model.py, memory/layer.py).
_NORM_PASSES, _ROPE_PASSES, _SWIGLU_PASSES, _GATE_PASSES = (10, 14), (8, 8), (8, 12), (5, 8)
# Attention's backward pass computes its scores again: five products where forward has two.
_ATTENTION_BACKWARD = 2.5
# Loss: logits read and written in their own width, and in float32 with the softmax; backward once.
_LOSS_PASSES = (4, 3)
# Bytes of an entry while it is routed to its owner: sorted by owner, both ways noted; with duplicates looked for; or
# merely made narrow for column shards.
_ROUTE_BYTES, _MERGE_BYTES, _CAST_BYTES = 40, 80, 12
# Phases of a memory layer, as marks, reports and the simulator name them.
MEMORY_PHASES = ("query", "topk", "route", "gather", "gate")


@dataclass(frozen=True)
class PhaseUs:
    """Microseconds of a phase in a forward and in a backward pass of a micro-batch."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


def is_recomputed(train: TrainConfig, phase: str) -> bool:
    """Whether the forward part of a block's phase is computed again in the backward pass."""
    if train.recompute != "selective":
        return train.recompute == "full"
    module = "core_attn" if phase == "core_attn" else "mlp" if phase in ("mlp", *MEMORY_PHASES) else ""
    return module in train.recompute_modules


def network_phase(run: RunConfig, block: int) -> str:
    """What `is_recomputed` is asked of the collectives behind a block's attention: experts are not part of `mlp`."""
    return "experts" if block in run.moe_layers else "mlp"


def block_compute_us(run: RunConfig, layout: Layout, block: int, hardware: Hardware) -> dict[str, PhaseUs]:
    """Times of a block's phases on one rank, for one micro-batch.

    Args:
        run: the run, as `layout.run`.
        layout: where it is laid out.
        block: 0-based number of the block.
        hardware: the device.

    Returns:
        By phase: `norms`, `attention` (projections and RoPE), `core_attn`, and `mlp` or `experts`, or what a memory
        layer has of `MEMORY_PHASES`; and `gradient_sums`, which have no forward part.
    """
    roof = Roofline(hardware, DTYPE_BYTES[run.train.dtype])
    width = run.model.hidden_size
    forward, backward = _NORM_PASSES
    numbers = layout.own_tokens * width
    found = {"norms": PhaseUs(roof.passes(numbers, forward, 4), roof.passes(numbers, backward, 4))}
    found |= _attention(run, layout, roof)
    memory = layout.memory_of(block)
    if block in run.moe_layers:
        found["experts"] = _experts(run, layout, roof)
    elif memory is None or memory.beside:
        found["mlp"] = _feed_forward(roof, layout.tokens, width, run.model.ffn_hidden_size // layout.grid.tp)
    if memory is not None:
        name = next(name for name, each in run.memories.items() if block in each.layers)
        found |= _memory(run, layout, memory, layout.placement.memories[name], roof)
    alone = Chunk(blocks=range(block, block + 1), is_first=False, is_last=False)
    return found | {"gradient_sums": PhaseUs(0.0, _gradient_sums(layout, alone, roof))}


def head_compute_us(run: RunConfig, layout: Layout, hardware: Hardware) -> PhaseUs:
    """Times of the last norm, the output projection and the loss of one micro-batch, gradients summed.

    So is the embedding's gradient where the same stage has it; a first stage of several, which has no output
    projection and so is not the slowest, is not charged for it.
    """
    roof = Roofline(hardware, DTYPE_BYTES[run.train.dtype])
    vocab = run.model.padded_vocab(layout.vocab) // layout.grid.tp
    product = roof.products(layout.tokens, run.model.hidden_size, vocab)
    wide = layout.tokens * vocab * (layout.value_bytes + layout.wide_bytes)
    forward, backward = (roof.bytes(passes / 2 * wide, passes) for passes in _LOSS_PASSES)
    ends = Chunk(blocks=range(0), is_first=layout.grid.pp == 1, is_last=True)
    return PhaseUs(product + forward, 2 * product + backward + _gradient_sums(layout, ends, roof))


def _gradient_sums(layout: Layout, chunk: Chunk, roof: Roofline) -> float:
    """A micro-batch's gradients of dense parameters, in their own width, added to those of the step in a wide one."""
    numbers = [each.numel for each in parameters_of(layout, chunk)]
    return roof.bytes(sum(numbers) * (layout.value_bytes + 2 * layout.wide_bytes), len(numbers))


def _attention(run: RunConfig, layout: Layout, roof: Roofline) -> dict[str, PhaseUs]:
    model, tp, tokens = run.model, layout.grid.tp, layout.tokens
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads // tp, model.query_groups // tp
    products = roof.products(tokens, width, head * (heads + 2 * groups)) + roof.products(tokens, head * heads, width)
    turned = tokens * head * (heads + groups)
    forward, backward = _ROPE_PASSES
    # Causal: half of all pairs of positions, two FLOPs for each number of a key and of a value.
    flops = 2 * tokens * run.train.seq_length * head * heads
    return {
        "attention": PhaseUs(
            products + roof.passes(turned, forward, 4), 2 * products + roof.passes(turned, backward, 4)
        ),
        "core_attn": PhaseUs(roof.attention(flops), roof.attention(_ATTENTION_BACKWARD * flops)),
    }


def _feed_forward(roof: Roofline, tokens: float, width: int, ffn: int) -> PhaseUs:
    products = roof.products(tokens, width, 2 * ffn) + roof.products(tokens, ffn, width)
    forward, backward = _SWIGLU_PASSES
    return PhaseUs(
        products + roof.passes(tokens * ffn, forward, 3), 2 * products + roof.passes(tokens * ffn, backward, 3)
    )


def _experts(run: RunConfig, layout: Layout, roof: Roofline) -> PhaseUs:
    """The router, tokens put into the experts' order and back, and the experts of a rank one by one."""
    moe, width, own = run.moe, run.model.hidden_size, layout.own_tokens
    here = moe.num_experts // layout.grid.ep
    # A rank's tensor-parallel group computes the tokens of all its ranks, and each expert an even share of all.
    one = _feed_forward(roof, layout.tokens * moe.top_k / here, width, run.expert_ffn_hidden_size // layout.grid.tp)
    router = roof.products(own, width, moe.num_experts)
    order = roof.passes(own * moe.top_k * width, 4, 2)
    return PhaseUs(router + order + here * one.forward, 2 * router + order + here * one.backward)


def _memory(
    run: RunConfig, layout: Layout, memory: MemoryConfig, placed: MemoryPlacement, roof: Roofline
) -> dict[str, PhaseUs]:
    """Phases of a memory layer, entries at their owner in `gather`."""
    plan = placed.plan
    own, width, value_dim = layout.own_tokens, run.model.hidden_size, plan.value_dim
    query = roof.products(own, width, memory.heads * memory.key_dim)
    found = {"query": PhaseUs(query, 2 * query), "topk": _topk(memory, own, roof, _score_roof(layout, memory, roof))}
    reads = looked_up(layout) * memory.heads * memory.top_k
    if plan.num_shards > 1:
        per_read = _MERGE_BYTES if placed.merge else _ROUTE_BYTES if plan.num_row_shards > 1 else _CAST_BYTES
        found["route"] = PhaseUs(roof.bytes(reads * per_read), 0.0)
    found["gather"] = _gather(run, layout, memory, plan, roof)
    if memory.variant == "memory_plus":
        products = roof.products(own, width, value_dim) + roof.products(own, value_dim, width)
        forward, backward = (roof.passes(own * value_dim, passes, 3) for passes in _GATE_PASSES)
        found["gate"] = PhaseUs(products + forward, 2 * products + backward)
    return found


def _score_roof(layout: Layout, memory: MemoryConfig, roof: Roofline) -> Roofline:
    """What half keys are multiplied on: torch's operators take them in float32 at least.

    Triton's kernels take them in bf16 for scores of bf16; else in their own width, which norms make float32.
    """
    if layout.is_fused and memory.score_dtype == "bf16":
        return Roofline(roof.hardware, 2)
    return roof if layout.is_fused and not memory.qk_norm else Roofline(roof.hardware, layout.wide_bytes)


def _topk(memory: MemoryConfig, tokens: int, roof: Roofline, score_roof: Roofline) -> PhaseUs:
    """Scores of half keys, written and read once, and the choice; backward touches the chosen keys alone."""
    lists = tokens * memory.heads * 2
    flops_us = score_roof.products(tokens, memory.half_key_dim, memory.num_subkeys) * memory.heads * 2
    score_bytes = 2 if memory.score_dtype == "bf16" else 4
    choice = roof.bytes(lists * memory.num_subkeys * 2 * score_bytes + 12 * tokens * memory.heads * memory.top_k, 2)
    # Keys for the queries' gradients, and queries for the keys'.
    again = roof.rows(2 * lists * memory.top_k, memory.half_key_dim * roof.value_bytes)
    return PhaseUs(flops_us + choice, again)


def _gather(run: RunConfig, layout: Layout, memory: MemoryConfig, plan: ShardPlan, roof: Roofline) -> PhaseUs:
    """Rows read for all members' tokens at an owner, sums written, packed and joined; backward reads rows again."""
    part, value_bytes = plan.part_of(0), run.value_bytes_of(memory)
    owned = deposits_of_lookup(layout, memory, plan, part)
    tables = len(memory.table_names)
    rows = tables * roof.rows(owned.entries, part.num_columns * value_bytes)
    sums = tables * owned.tokens * part.num_columns * value_bytes
    own = tables * looked_up(layout) * plan.value_dim * value_bytes
    joined = (plan.num_row_shards + 1) * own if plan.num_shards > 1 else 0
    return PhaseUs(
        rows + roof.bytes(sums + joined, 2), rows + roof.bytes(sums + (2 * own if plan.num_shards > 1 else 0), 2)
    )
