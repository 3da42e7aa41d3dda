"""What blocks keep of a micro-batch for its backward pass, and what exists besides while one of them runs.

Taken from the CPU's engine, where a test compares every term with what autograd saves: attention, RoPE, the SwiGLU
(whose code does not differ on a GPU: `x_linear + 0` makes a copy of a half), experts, memory layers, loss. Assumed of
the GPU's: an RMSNorm keeps its input, its output and one number a token there, fused in TransformerEngine's projections
or in torch; on the CPU torch composes it of parts and keeps it wide. Fused attention keeps queries, keys, values, its
output and one float32 a query, as torch's does. Cut sequences (context parallelism) are taken to keep their share.

Tensor parallelism cuts what is inside attention and feed-forward networks; sequence parallelism cuts the rest too:
norms, inputs and memory layers. `train.recompute=full` keeps a block's input alone; `selective` drops what is inside
its modules. What is computed again exists for one block at a time.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mempar.runtime.estimate.layout import Chunk, Layout
from mempar.runtime.estimate.lookups import lookup_buffers, lookup_bytes

_LONG_BYTES, _FLOAT32_BYTES = 8, 4
# Of a pipeline: an activation received ahead, a gradient received, one sent and one on its way.
_MESSAGES_IN_PIPELINE = 4


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """One block's part of a micro-batch.

    Attributes:
        kept: from its forward pass to its backward pass.
        again: besides, while it is differentiated: what is computed again.
        gradients: besides, while it is differentiated.
        buffers: besides, while it is computed: of memory layers and experts.
    """

    kept: int
    again: int
    gradients: int
    buffers: int


def norm_bytes(layout: Layout) -> int:
    """An RMSNorm with what the projection after it keeps: the norm's output."""
    tokens, width = layout.own_tokens, layout.run.model.hidden_size
    own, wide = layout.value_bytes, layout.wide_bytes
    rows = 2 * own if layout.on_gpu else 2 * wide + own
    return tokens * (width * rows + wide)


def attention_bytes(layout: Layout) -> int:
    """Queries, keys and values as projected, queries and keys turned by RoPE, the output, and sums of exponentials."""
    model, tp, tokens = layout.run.model, layout.grid.tp, layout.tokens
    head = model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads // tp, model.query_groups // tp
    projected, turned = heads + 2 * groups, heads + groups
    kept = tokens * head * (projected + turned + heads) * layout.value_bytes
    # Cosines and sines, of queries and of keys.
    return kept + tokens * heads * layout.wide_bytes + 4 * layout.positions * head * layout.value_bytes


def feed_forward_bytes(layout: Layout, tokens: int, ffn: int) -> int:
    """Both halves as projected, silu of one and a copy of the other, and their product."""
    return 5 * tokens * ffn // layout.grid.tp * layout.value_bytes


def experts_bytes(layout: Layout) -> int:
    """The router's choice, tokens in the experts' order, and what the experts keep, if all get equally many."""
    run = layout.run
    tokens, own, wide = layout.own_tokens, layout.value_bytes, layout.wide_bytes
    chosen, routed = tokens * run.moe.top_k, layout.tokens * run.moe.top_k
    # The chosen experts' numbers and weights, both spread over all experts, and the tokens' new order.
    router = chosen * (_LONG_BYTES + wide) + tokens * run.moe.num_experts * (1 + wide) + chosen * _LONG_BYTES
    inside = run.expert_ffn_hidden_size // layout.grid.tp
    # As a feed-forward network, whose product is weighted by the router besides.
    return router + routed * (run.model.hidden_size * own + wide) + 6 * routed * inside * own


def block_bytes(layout: Layout, block: int) -> BlockBytes:
    """One block's part of a micro-batch."""
    key = ("bytes", layout.like[block])
    if key not in layout.by_kind:
        layout.by_kind[key] = _block_bytes(layout, block)
    return layout.by_kind[key]


def _block_bytes(layout: Layout, block: int) -> BlockBytes:
    run, tokens = layout.run, layout.tokens
    name = next((name for name, memory in run.memories.items() if block in memory.layers), "")
    memory = run.memories.get(name)
    is_moe = block in run.moe_layers
    attention, mlp, buffers, gradients = attention_bytes(layout), 0, 0, 0
    if is_moe:
        mlp = experts_bytes(layout)
        routed = tokens * run.moe.top_k
        buffers = 2 * routed * run.model.hidden_size * layout.value_bytes
        gradients = 2 * routed * run.expert_ffn_hidden_size // layout.grid.tp * layout.value_bytes
    elif memory is None or memory.beside:
        mlp = feed_forward_bytes(layout, tokens, run.model.ffn_hidden_size)
        gradients = 2 * tokens * run.model.ffn_hidden_size // layout.grid.tp * layout.value_bytes
    if memory is not None:
        mlp += lookup_bytes(layout, name, memory)
        buffers = lookup_buffers(layout, name, memory)
    inputs = layout.own_tokens * run.model.hidden_size * layout.value_bytes
    kept, again = _split(layout, norms=2 * norm_bytes(layout), attention=attention, mlp=mlp, is_moe=is_moe)
    # The gradients of a block's output and of its residual stream.
    return BlockBytes(kept=kept, again=again, gradients=gradients + 2 * inputs, buffers=buffers)


def _split(layout: Layout, *, norms: int, attention: int, mlp: int, is_moe: bool) -> tuple[int, int]:
    """What a block keeps, and what it computes again."""
    train = layout.run.train
    everything = norms + attention + mlp
    if train.recompute == "full":
        width = layout.run.model.hidden_size
        return layout.own_tokens * width * layout.value_bytes, everything
    again = 0
    if train.recompute == "selective":
        if "mlp" in train.recompute_modules and not is_moe:
            again += mlp
        if "core_attn" in train.recompute_modules:
            # Its inputs and its output stay.
            again += layout.tokens * layout.run.model.num_attention_heads // layout.grid.tp * layout.wide_bytes
    return everything - again, again


def chunk_bytes(layout: Layout, chunk: Chunk) -> int:
    """What a chunk keeps of a micro-batch, logits and what the loss keeps beside them left out."""
    run, tokens = layout.run, layout.tokens
    width = run.model.hidden_size
    kinds = Counter(layout.like[block] for block in chunk.blocks)
    kept = sum(number * block_bytes(layout, block).kept for block, number in kinds.items())
    if run.train.recompute == "full":
        # RoPE's angles, once for all blocks.
        kept += layout.positions * width // run.model.num_attention_heads * _FLOAT32_BYTES
    if chunk.is_first and layout.grid.tp > 1:
        # Tokens within this rank's part of the vocabulary, and which are outside.
        kept += tokens * (_LONG_BYTES + 1)
    if chunk.is_last:
        return kept + norm_bytes(layout)
    # The output, which the schedule holds until its gradient has come.
    return kept + layout.own_tokens * width * layout.value_bytes


def softmax_bytes(layout: Layout) -> int:
    """What the loss keeps: softmax, and which token is the right one."""
    vocab = layout.run.model.padded_vocab(layout.vocab) // layout.grid.tp
    return layout.tokens * (vocab * layout.wide_bytes + _LONG_BYTES + 1)


def logits_bytes(layout: Layout) -> int:
    """Most bytes of logits, softmax, their gradients and the output projection's, of a micro-batch at a time."""
    model, own = layout.run.model, layout.value_bytes
    vocab = model.padded_vocab(layout.vocab) // layout.grid.tp
    narrow = layout.tokens * vocab * own
    # In float32 the softmax takes the logits' place.
    losses = softmax_bytes(layout) + (narrow if own < layout.wide_bytes else 0)
    projection = narrow + vocab * model.hidden_size * own + layout.own_tokens * model.hidden_size * own
    return max(losses, projection)


def blocks_of(layout: Layout, stage: int) -> Iterator[BlockBytes]:
    """The blocks of a stage, one of each kind."""
    for block in {layout.like[block] for chunk in layout.chunks_of(stage) for block in chunk.blocks}:
        yield block_bytes(layout, block)


def buffer_bytes(layout: Layout, stage: int) -> int:
    """Messages on their way between stages and of the layers, gathered sequences, and the batch itself."""
    width, own = layout.run.model.hidden_size, layout.value_bytes
    layers = max(block.buffers for block in blocks_of(layout, stage))
    pipeline = _MESSAGES_IN_PIPELINE * layout.own_tokens * width * own if layout.grid.pp > 1 else 0
    # A sequence gathered for a projection, and in backward its gradient too.
    sequences = 2 * layout.tokens * width * own if layout.num_in_tensor > 1 else 0
    # Tokens, labels, weights in the loss and positions (shared by the samples) of all micro-batches of a step.
    length = layout.run.train.seq_length
    samples = layout.run.train.micro_batch_size * (2 * _LONG_BYTES + _FLOAT32_BYTES) + _LONG_BYTES
    return layers + pipeline + sequences + layout.batch.num_micro_batches * length * samples
