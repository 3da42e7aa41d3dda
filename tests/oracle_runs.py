"""A run's settings in the words of the oracle, which knows nothing of mempar."""

from typing import Any

import oracle
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig


def oracle_config(run: RunConfig) -> oracle.OracleConfig:
    """Say a run's model as the oracle says it."""
    model = run.model
    shapes = [_shape(name, memory) for name, memory in run.memories.items()]
    return oracle.OracleConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        rotary_base=model.rotary_base,
        norm_epsilon=model.norm_epsilon,
        tie_embeddings=model.tie_embeddings,
        moe_layers=run.moe_layers,
        num_experts=run.moe.num_experts,
        experts_per_token=run.moe.top_k,
        balance_loss=run.moe.aux_loss,
        more_memories=tuple(oracle.MemoryShape(**shape) for shape in shapes[1:]),
        **(shapes[0] if shapes else {}),
    )


def _shape(name: str, memory: MemoryConfig) -> dict[str, Any]:
    return {
        "name": name,
        "memory_layers": memory.layers,
        "variant": memory.variant,
        "beside": memory.beside,
        "num_subkeys": memory.num_subkeys,
        "heads": memory.heads,
        "top_k": memory.top_k,
        "qk_norm": memory.qk_norm,
        "scalar_gate": memory.scalar_gate,
    }


def oracle_optim(run: RunConfig) -> oracle.OptimConfig:
    """Say a run's optimizers as the oracle says them; all memories have the first one's settings."""
    optim, memory = run.optim, run.memory
    return oracle.OptimConfig(
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        memory_lr=run.values_lr_of(memory),
        memory_weight_decay=run.values_weight_decay_of(memory),
        memory_clip_grad=memory.clip_grad,
        joint_clip=memory.clip == "joint",
        column_tile=memory.column_tile,
    )
