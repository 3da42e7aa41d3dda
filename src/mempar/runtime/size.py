"""Counting parameters and FLOPs from the configuration alone.

FLOPs count matrix products (a multiply and an add are two), three times the forward pass for
training; reading table rows is bandwidth, not FLOPs, so values never count, and of experts those that
a token is not sent to do not.
"""

from dataclasses import dataclass

from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        total_params: all parameters, the table included.
        active_params: parameters that one token's forward pass multiplies or reads.
        memory_params: elements of the tables.
        flops_per_token: training FLOPs (forward and backward) of one token at the run's length.
    """

    total_params: int
    active_params: int
    memory_params: int
    flops_per_token: int


def model_size(run: RunConfig, vocab_size: int) -> ModelSize:
    """Count one run's model for a tokenizer of `vocab_size` tokens."""
    model = run.model
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    vocab = model.padded_vocab(vocab_size)
    attention = width * head * 2 * (model.num_attention_heads + model.query_groups)
    norms = (2 * model.num_layers + 1) * width
    feed_forward = 3 * width * model.ffn_hidden_size
    embeddings = vocab * width * (1 if model.tie_embeddings else 2)
    num_moe = len(run.moe_layers)
    dense_layers = model.num_layers - num_moe
    router, expert = width * run.moe.num_experts, 3 * width * run.expert_ffn_hidden_size
    chosen = num_moe * (router + run.moe.top_k * expert)
    idle = num_moe * (run.moe.num_experts - run.moe.top_k) * expert
    layers = multiplied = tables = reads = 0
    for memory in run.memories.values():
        count, tables_of, value_dim = len(memory.layers), len(memory.table_names), run.value_dim_of(memory)
        params, products = _memory_layer(run, memory)
        dense_layers -= 0 if memory.beside else count
        layers += count * params
        multiplied += count * products
        tables += tables_of * memory.num_slots * value_dim
        reads += count * tables_of * memory.heads * memory.top_k * value_dim
    dense = embeddings + norms + model.num_layers * attention + dense_layers * feed_forward + layers + chosen
    # The embedding is a lookup; the output projection multiplies it whole.
    products = model.num_layers * attention + dense_layers * feed_forward + multiplied + chosen + vocab * width
    scores = model.num_layers * 2 * width * run.train.seq_length // 2
    return ModelSize(
        total_params=dense + idle + tables,
        active_params=dense + reads,
        memory_params=tables,
        flops_per_token=6 * (products + scores),
    )


def _memory_layer(run: RunConfig, memory: MemoryConfig) -> tuple[int, int]:
    """Parameters of one memory layer without its tables, and its multiply-adds a token."""
    width, value_dim = run.model.hidden_size, run.value_dim_of(memory)
    query = width * memory.heads * memory.key_dim
    keys = memory.heads * 2 * memory.num_subkeys * memory.half_key_dim
    params = query + memory.heads * memory.key_dim + keys
    multiplied = query + keys
    if memory.variant == "memory_plus":
        params += 2 * width * value_dim + value_dim + width
        multiplied += 2 * width * value_dim
    if memory.scalar_gate:
        params += width + 1
    if memory.qk_norm:
        params += 2 * memory.half_key_dim
    return params, multiplied
