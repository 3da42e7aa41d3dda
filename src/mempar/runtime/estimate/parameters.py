"""Dense parameters of one rank, one by one, in the order in which megatron lays them out.

The order matters to the distributed optimizer alone, which aligns parameters and cuts them without regard to where
they end. It is that of megatron's local blocks; TransformerEngine's have the same parameters with the norms inside the
projections, which moves alignments by a few hundred bytes.
"""

from dataclasses import dataclass

from mempar.memory.config import MemoryConfig
from mempar.runtime.estimate.layout import Chunk, Layout


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter's share on a rank.

    Attributes:
        numel: its elements.
        of_experts: whether it belongs to experts, whose copies lie on fewer ranks.
        shared: whether it is a tied embedding that two stages hold.
    """

    numel: int
    of_experts: bool = False
    shared: bool = False


def parameters_of(layout: Layout, chunk: Chunk) -> list[Parameter]:
    """The parameters of a chunk on each of its ranks."""
    model, tp = layout.run.model, layout.grid.tp
    width = model.hidden_size
    tied = model.tie_embeddings
    embedding = model.padded_vocab(layout.vocab) // tp * width
    shared = tied and layout.grid.pp > 1
    found = [Parameter(numel=embedding, shared=shared)] if chunk.is_first else []
    for block in chunk.blocks:
        key = ("parameters", layout.like[block])
        if key not in layout.by_kind:
            layout.by_kind[key] = _block(layout, block)
        found += layout.by_kind[key]
    if chunk.is_last:
        found.append(Parameter(numel=width))
    # A stage that has the embedding too projects with that.
    if chunk.is_last and not (tied and chunk.is_first):
        found.append(Parameter(numel=embedding, shared=shared))
    return found


def _block(layout: Layout, block: int) -> list[Parameter]:
    run, tp = layout.run, layout.grid.tp
    model = run.model
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads // tp, model.query_groups // tp
    attention = [width, width * heads * head, width * head * (heads + 2 * groups)]
    plain = [*attention, width]
    memory = layout.memory_of(block)
    if block in run.moe_layers:
        expert = _feed_forward(width, run.expert_ffn_hidden_size // tp)
        experts = [Parameter(numel=numel, of_experts=True) for numel in expert]
        router = width * run.moe.num_experts
        return [*_dense([*plain, router]), *experts * (run.moe.num_experts // run.parallel.ep)]
    if memory is None or memory.beside:
        plain += _feed_forward(width, model.ffn_hidden_size // tp)
    if memory is not None:
        plain += _memory_layer(memory, width, run.value_dim_of(memory))
    return _dense(plain)


def _dense(sizes: list[int]) -> list[Parameter]:
    return [Parameter(numel=numel) for numel in sizes]


def _feed_forward(width: int, ffn: int) -> list[int]:
    """SwiGLU: two projections in one matrix, and one back."""
    return [2 * width * ffn, width * ffn]


def _memory_layer(memory: MemoryConfig, width: int, value_dim: int) -> list[int]:
    """Keys, queries, norms, gates; every tensor-parallel rank holds them whole."""
    queries = memory.heads * memory.key_dim
    sizes = [memory.heads * 2 * memory.num_subkeys * memory.half_key_dim, width * queries, queries]
    if memory.qk_norm:
        sizes += [memory.half_key_dim, memory.half_key_dim]
    if memory.variant == "memory_plus":
        sizes += [width * value_dim, value_dim, value_dim * width, width]
    if memory.scalar_gate:
        sizes += [width, 1]
    return sizes
