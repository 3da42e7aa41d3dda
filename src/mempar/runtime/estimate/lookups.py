"""What one memory layer keeps of a micro-batch for its backward pass, and what it needs while it is computed.

The same code runs on every device (memory/layer.py, parallel/exchange.py), so these terms hold on GPUs too; but for
the norm of keys, which torch fuses there, and the scores, of which Triton's kernels make a bounded chunk. T are the
tokens that a rank holds, P T' those that all members of a memory-parallel group look up (T' is a share of T where
tensor-parallel ranks hold the same ones), E = P T' M / R the reads of a row shard's rows.
"""

from mempar.memory.config import MemoryConfig
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.tables import deposits_of_lookup, looked_up

_SLOT_BYTES, _INDEX_BYTES = 8, 4
# Most bytes of the scores of a chunk of tokens, and how often a chunk exists beside what is chosen of it:
# kernels/product_topk, fused.py and native.py. The latter sorts scores with their numbers.
_FUSED_SCORE_BYTES = 128 << 20
_SCORES_AT_ONCE = {True: 1 << 26, False: 1 << 24}


def lookup_bytes(layout: Layout, name: str, memory: MemoryConfig) -> int:
    """Bytes that one layer keeps, its input (the output of the norm before it) not counted."""
    placed = layout.placement.memories[name]
    return _choice_bytes(layout, memory) + _read_bytes(layout, memory, placed.plan) + _gate_bytes(layout, memory)


def _choice_bytes(layout: Layout, memory: MemoryConfig) -> int:
    """Queries, keys where they are not the parameter itself, slots and weights."""
    tokens, own, wide = layout.own_tokens, layout.value_bytes, layout.wide_bytes
    operand = 2 if memory.score_dtype == "bf16" else own
    lists = memory.heads * 2
    keys = lists * memory.num_subkeys * memory.half_key_dim
    kept = tokens * memory.heads * memory.key_dim * operand
    kept += tokens * memory.heads * memory.top_k * (_SLOT_BYTES + wide)
    if memory.qk_norm:
        # Keys made wide, normalised, weighted by their norm and by the queries'; fused they are two steps.
        copies = (2 if layout.on_gpu else 3) + (own < wide)
        kept += copies * keys * wide + lists * memory.num_subkeys * wide + tokens * lists * wide
    elif operand != own:
        kept += keys * operand
    return kept


def _read_bytes(layout: Layout, memory: MemoryConfig, plan: ShardPlan) -> int:
    """What finds the rows, here and at their owners, and the products of experts."""
    reads, wide = memory.heads * memory.top_k, layout.wide_bytes
    value_bytes = layout.run.value_bytes_of(memory)
    tokens = looked_up(layout)
    entries = tokens * reads
    if plan.num_shards == 1:
        kept = _INDEX_BYTES * (entries + tokens + 1)
        if memory.variant != "peer":
            return kept + (entries * value_bytes if value_bytes != wide else 0)
        kept += layout.own_tokens * plan.value_dim * value_bytes if value_bytes != layout.value_bytes else 0
        if looked_up(layout) == layout.own_tokens:
            # One operation keeps the products.
            return kept + entries * wide
        # The products' weights: a share of a tensor of all tokens keeps that one whole.
        kept += entries * value_bytes if value_bytes != wide else layout.own_tokens * reads * wide
        return kept + 2 * layout.own_tokens * reads * wide
    routed = _INDEX_BYTES * entries
    if plan.num_row_shards > 1:
        routed += 2 * _INDEX_BYTES * entries + plan.num_row_shards * tokens * (1 if reads <= 255 else 2)
    part = plan.part_of(0)
    owned = deposits_of_lookup(layout, memory, plan, part)
    kept = routed + owned.entries * (_INDEX_BYTES + value_bytes) + _INDEX_BYTES * (owned.tokens + 1)
    if memory.variant == "peer":
        kept += owned.tokens * part.num_columns * value_bytes + 2 * layout.own_tokens * reads * wide
    return kept


def _gate_bytes(layout: Layout, memory: MemoryConfig) -> int:
    """Memory+'s sums, gate, its silu and their product; the scalar gate's output and input."""
    tokens, own = layout.own_tokens, layout.value_bytes
    kept = 4 * tokens * layout.run.value_dim_of(memory) * own if memory.variant == "memory_plus" else 0
    return kept + (tokens * (layout.run.model.hidden_size + 1) * own if memory.scalar_gate else 0)


def lookup_buffers(layout: Layout, name: str, memory: MemoryConfig) -> int:
    """Most bytes that one layer needs besides while it is computed: scores of a chunk, or messages of the exchange.

    Going forward an owner's sums of all tokens, what arrives of this rank's, and these joined, exist together; going
    backward less does, since what arrives is kept as a record.
    """
    plan = layout.placement.memories[name].plan
    value_bytes, tokens = layout.run.value_bytes_of(memory), looked_up(layout)
    messages = 0
    if plan.num_shards > 1:
        part = plan.part_of(0)
        sums = tokens * plan.num_shards * part.num_columns
        if layout.grid.mp_hops == 2:
            # Reordered for the first hop; what arrives are the sums of this row coordinate's tokens.
            sums *= 2
        messages = value_bytes * (sums + (plan.num_row_shards + 1) * tokens * plan.value_dim)
    return max(messages, _score_bytes(layout, memory))


def _score_bytes(layout: Layout, memory: MemoryConfig) -> int:
    scores = layout.own_tokens * memory.heads * 2 * memory.num_subkeys
    if layout.is_fused:
        return min(_FUSED_SCORE_BYTES, scores * (2 if memory.score_dtype == "bf16" else 4))
    # Scores, and as many 64-bit numbers beside them while they are sorted.
    return min(_SCORES_AT_ONCE[layout.on_gpu], scores) * (layout.wide_bytes + _SLOT_BYTES)
