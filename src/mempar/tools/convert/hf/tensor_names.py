"""Which tensor of transformers' is which part of a tensor of ours.

Ours are those of checkpoints: logical tensors, named as megatron does. A query-key-value projection holds, group by
group, the group's query heads, its key head and its value head; the first half of `linear_fc1` is the gate. Those of
transformers are a Llama's, with `mlp.memory.` or `mlp.experts.` in some blocks:

    embedding.word_embeddings.weight                         model.embed_tokens.weight
    output_layer.weight (unless tied)                        lm_head.weight
    decoder.final_layernorm.weight                           model.norm.weight
    decoder.layers.L.                                        model.layers.L.
      self_attention.linear_qkv.layer_norm_weight              input_layernorm.weight
      self_attention.linear_qkv.weight                         self_attn.q_proj.weight, .k_proj., .v_proj.
      self_attention.linear_proj.weight                        self_attn.o_proj.weight
      mlp.linear_fc1.layer_norm_weight                         post_attention_layernorm.weight
      mlp.linear_fc1.weight, mlp.linear_fc2.weight             mlp.gate_proj.weight, .up_proj., .down_proj.
      mlp.NAME, or mlp.memory.NAME beside a network            mlp.memory.NAME
      mlp.router.weight                                        mlp.router.weight
      mlp.experts.experts.linear_fc1.weight [E, ...], fc2      mlp.experts.E.gate_proj.weight, .up_proj., .down_proj.
    memory.values, memory.down [S, D]                        memory.values.rows-FIRST, ..., in files of their own

The vocabulary keeps its padding. Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mempar.memory.config import MemoryConfig
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.config import RunConfig

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_MARK, _ROWS_DIGITS = ".rows-", 12


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """A tensor of transformers' that is made of parts of one of ours.

    Attributes:
        name: there.
        shape: there.
        pieces: parts of our tensor, whose elements in this order are its elements.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Box, ...]

    @property
    def logical(self) -> str:
        """The name of our tensor."""
        return self.pieces[0].name

    @property
    def num_elements(self) -> int:
        """Elements of it."""
        return prod(self.shape)


def dense_tensors(run: RunConfig, vocab_rows: int) -> list[HfTensor]:
    """All tensors of a model but its tables; those that are made of one of ours follow each other.

    Args:
        run: the model.
        vocab_rows: rows of the embedding, padding included.
    """
    width = run.model.hidden_size
    tensors = [_same(EMBEDDING, HF_EMBEDDING, (vocab_rows, width))]
    for block in range(run.model.num_layers):
        tensors += _block_tensors(run, block)
    tensors.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (width,)))
    if not run.model.tie_embeddings:
        tensors.append(_same(OUTPUT, HF_OUTPUT, (vocab_rows, width)))
    return tensors


def table_shapes(run: RunConfig) -> dict[str, tuple[int, int]]:
    """The tables of a model, `[S, D]` by name, in the order of their numbers."""
    return {
        f"{name}.{kind}": (memory.num_slots, run.value_dim_of(memory))
        for name, memory in run.memories.items()
        for kind in memory.table_names
    }


def memory_shapes(run: RunConfig, memory: MemoryConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of one memory layer, by their names in it."""
    width, value_dim, half = run.model.hidden_size, run.value_dim_of(memory), memory.half_key_dim
    queries = memory.heads * memory.key_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query.weight": (queries, width),
        "query.bias": (queries,),
        "keys": (memory.heads, 2, memory.num_subkeys, half),
    }
    if memory.qk_norm:
        shapes |= {"query_norm.weight": (half,), "key_norm.weight": (half,)}
    if memory.variant == "memory_plus":
        shapes |= {"gate_proj.weight": (value_dim, width), "gate_proj.bias": (value_dim,)}
        shapes |= {"output_proj.weight": (width, value_dim), "output_proj.bias": (width,)}
    if memory.scalar_gate:
        shapes |= {"scalar_gate.weight": (1, width), "scalar_gate.bias": (1,)}
    return shapes


def rows_name(table: str, first: int) -> str:
    """The name of a block of a table's rows that begins with row `first`."""
    return f"{table}{_ROWS_MARK}{first:0{_ROWS_DIGITS}d}"


def parse_rows_name(name: str) -> tuple[str, int] | None:
    """The table and the first row that the name of a block tells; None for other names."""
    table, mark, first = name.rpartition(_ROWS_MARK)
    known = mark and len(first) == _ROWS_DIGITS and first.isascii() and first.isdigit()
    return (table, int(first)) if known else None


def _block_tensors(run: RunConfig, block: int) -> Iterator[HfTensor]:
    model = run.model
    ours, theirs, width = f"decoder.layers.{block}", f"model.layers.{block}", model.hidden_size
    attention = f"{ours}.self_attention"
    yield _same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", (width,))
    yield from _attention_tensors(run, f"{attention}.linear_qkv.weight", f"{theirs}.self_attn")
    heads_width = model.num_attention_heads * (width // model.num_attention_heads)
    yield _same(f"{attention}.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (width, heads_width))
    yield _same(f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight", (width,))
    memory = next((memory for memory in run.memories.values() if block in memory.layers), None)
    if block in run.moe_layers:
        yield from _expert_tensors(run, f"{ours}.mlp", f"{theirs}.mlp")
    elif memory is None or memory.beside:
        yield from _network_tensors(run, f"{ours}.mlp", f"{theirs}.mlp")
    if memory is not None:
        place = f"{ours}.mlp.memory" if memory.beside else f"{ours}.mlp"
        for name, shape in memory_shapes(run, memory).items():
            # Of the norms, transformers knows the weights alone.
            hf_name = name.removesuffix(".weight") if name.endswith("_norm.weight") else name
            yield _same(f"{place}.{name}", f"{theirs}.mlp.memory.{hf_name}", shape)


def _attention_tensors(run: RunConfig, ours: str, theirs: str) -> Iterator[HfTensor]:
    model = run.model
    head, groups = model.hidden_size // model.num_attention_heads, model.query_groups
    queries = model.num_attention_heads // groups
    shape = (groups * (queries + 2) * head, model.hidden_size)
    # In each group: the first head and the number of heads of each kind.
    for kind, first, count in (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1)):
        starts = [(group * (queries + 2) + first) * head for group in range(groups)]
        pieces = tuple(_rows(ours, shape, start, count * head) for start in starts)
        yield HfTensor(
            name=f"{theirs}.{kind}_proj.weight", shape=(groups * count * head, model.hidden_size), pieces=pieces
        )


def _network_tensors(run: RunConfig, ours: str, theirs: str) -> Iterator[HfTensor]:
    width, inner = run.model.hidden_size, run.model.ffn_hidden_size
    for half, kind in enumerate(("gate", "up")):
        piece = _rows(f"{ours}.linear_fc1.weight", (2 * inner, width), half * inner, inner)
        yield HfTensor(name=f"{theirs}.{kind}_proj.weight", shape=(inner, width), pieces=(piece,))
    yield _same(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", (width, inner))


def _expert_tensors(run: RunConfig, ours: str, theirs: str) -> Iterator[HfTensor]:
    width, inner, count = run.model.hidden_size, run.expert_ffn_hidden_size, run.moe.num_experts
    yield _same(f"{ours}.router.weight", f"{theirs}.router.weight", (count, width))
    first, second = f"{ours}.experts.experts.linear_fc1.weight", f"{ours}.experts.experts.linear_fc2.weight"
    for expert in range(count):
        for half, kind in enumerate(("gate", "up")):
            piece = _box(first, (count, 2 * inner, width), (expert, half * inner, 0), (1, inner, width))
            yield HfTensor(name=f"{theirs}.experts.{expert}.{kind}_proj.weight", shape=(inner, width), pieces=(piece,))
    for expert in range(count):
        piece = _box(second, (count, width, inner), (expert, 0, 0), (1, width, inner))
        yield HfTensor(name=f"{theirs}.experts.{expert}.down_proj.weight", shape=(width, inner), pieces=(piece,))


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> HfTensor:
    return HfTensor(name=theirs, shape=shape, pieces=(_rows(ours, shape, 0, shape[0]),))


def _rows(name: str, shape: tuple[int, ...], start: int, count: int) -> Box:
    return _box(name, shape, (start,) + (0,) * (len(shape) - 1), (count, *shape[1:]))


def _box(name: str, shape: tuple[int, ...], offset: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    # What type the numbers have is known to whoever holds them.
    return Box(name=name, dtype="", shape=shape, offset=offset, sizes=sizes)
