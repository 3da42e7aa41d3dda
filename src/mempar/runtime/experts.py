"""Mixture-of-experts blocks in terms of megatron: its settings, its module, and whom its experts belong to.

Every rank uses megatron's local SequentialMLP, one SwiGLU MLP an expert: its grouped products and fused
permutations need TransformerEngine.
"""

from typing import Any

from torch import nn

from mempar.runtime import mcore
from mempar.runtime.config import RunConfig


def expert_settings(run: RunConfig) -> dict[str, Any]:
    """Fields of megatron's TransformerConfig that describe the experts; none for a model without them."""
    if not run.moe.enabled:
        return {}
    return {
        "num_moe_experts": run.moe.num_experts,
        "moe_router_topk": run.moe.top_k,
        "moe_ffn_hidden_size": run.expert_ffn_hidden_size,
        "expert_model_parallel_size": run.parallel.ep,
        "expert_tensor_parallel_size": run.parallel.tp,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        # With one expert a token, the softmax over the chosen would be 1 and teach the router nothing.
        "moe_router_pre_softmax": run.moe.top_k == 1,
        # Otherwise it is the activations' dtype: in bf16 many experts tie.
        "moe_router_dtype": "fp64" if run.train.dtype == "float64" else "fp32",
        "moe_router_load_balancing_type": "aux_loss" if run.moe.aux_loss else "none",
        "moe_aux_loss_coeff": run.moe.aux_loss,
    }


def expert_module(run: RunConfig) -> Any:
    """Megatron's description of what stands in the place of an FFN."""
    return mcore.get_moe_module_spec(use_te=False, num_experts=run.moe.num_experts, moe_grouped_gemm=False)


def keep_apart(chunk: nn.Module) -> None:
    """Give experts a gradient buffer and an optimizer of their own, whatever the expert-parallel size.

    Megatron does so only beyond one expert-parallel rank, and lays checkpoints out by it: without this,
    none could be continued at another size.
    """
    for name, param in chunk.named_parameters():
        if ".mlp.experts." in name:
            # Megatron's mark of parameters whose copies are on the expert-data-parallel ranks only.
            param.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
