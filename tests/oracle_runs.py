"""A run's settings in the words of the oracle, which knows nothing of mempar."""

import oracle
from mempar.runtime.config import RunConfig


def oracle_config(run: RunConfig) -> oracle.OracleConfig:
    """Say a run's model as the oracle says it."""
    model, memory = run.model, run.memory
    return oracle.OracleConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        rotary_base=model.rotary_base,
        norm_epsilon=model.norm_epsilon,
        tie_embeddings=model.tie_embeddings,
        memory_layers=memory.layers if memory.enabled else (),
        variant=memory.variant,
        num_subkeys=memory.num_subkeys,
        heads=memory.heads,
        top_k=memory.top_k,
        qk_norm=memory.qk_norm,
        scalar_gate=memory.scalar_gate,
    )


def oracle_optim(run: RunConfig) -> oracle.OptimConfig:
    """Say a run's optimizers as the oracle says them."""
    optim = run.optim
    return oracle.OptimConfig(
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        memory_lr=run.values_lr,
        memory_weight_decay=run.values_weight_decay,
        memory_clip_grad=run.memory.clip_grad,
        joint_clip=run.memory.clip == "joint",
        column_tile=run.memory.column_tile,
    )
