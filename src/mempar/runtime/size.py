"""Counting parameters and FLOPs from the configuration alone.

FLOPs count matrix products (a multiply and an add are two), three times the forward pass for
training; reading table rows is bandwidth, not FLOPs, so values never count.
"""

from dataclasses import dataclass

from mempar.runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        total_params: all parameters, the table included.
        active_params: parameters that one token's forward pass multiplies or reads.
        memory_params: elements of the table.
        flops_per_token: training FLOPs (forward and backward) of one token at the run's length.
    """

    total_params: int
    active_params: int
    memory_params: int
    flops_per_token: int


def model_size(run: RunConfig, vocab_size: int) -> ModelSize:
    """Count one run's model for a tokenizer of `vocab_size` tokens."""
    model, memory = run.model, run.memory
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    vocab = model.padded_vocab(vocab_size)
    attention = width * head * 2 * (model.num_attention_heads + model.query_groups)
    norms = (2 * model.num_layers + 1) * width
    feed_forward = 3 * width * model.ffn_hidden_size
    num_memory = len(memory.layers) if memory.enabled else 0
    embeddings = vocab * width * (1 if model.tie_embeddings else 2)
    layer, multiplied = _memory_layer(run) if num_memory else (0, 0)
    dense_layers = model.num_layers - num_memory
    dense = embeddings + norms + model.num_layers * attention + dense_layers * feed_forward + num_memory * layer
    table = memory.num_slots * run.value_dim if num_memory else 0
    reads = memory.heads * memory.top_k * run.value_dim * num_memory
    # The embedding is a lookup; the output projection multiplies it whole.
    products = model.num_layers * attention + dense_layers * feed_forward + num_memory * multiplied + vocab * width
    scores = model.num_layers * 2 * width * run.train.seq_length // 2
    return ModelSize(
        total_params=dense + table,
        active_params=dense + reads,
        memory_params=table,
        flops_per_token=6 * (products + scores),
    )


def _memory_layer(run: RunConfig) -> tuple[int, int]:
    """Parameters of one memory layer without values, and its multiply-adds a token."""
    memory, width, value_dim = run.memory, run.model.hidden_size, run.value_dim
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
