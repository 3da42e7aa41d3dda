"""Every megatron-core import of mempar, under the names that the rest of it uses.

One place to see what of megatron we stand on, and the place where machines without CUDA are cured:
the cure must be in effect before anything of megatron is built.
"""

import importlib.util
import logging
import warnings
from typing import Any

from mempar.runtime import cpu
from mempar.runtime.cpu import make_moments

with warnings.catch_warnings():
    # Import-time notices about optional packages; what matters of them, doctor says.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split
    from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factory_merges, is_main_replica
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe import router as moe_router
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from megatron.core.utils import get_batch_on_this_cp_rank

logging.getLogger("megatron").setLevel(logging.ERROR)
RUNS_ON_CPU = cpu.install(tensor_parallel.random)
HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None and not RUNS_ON_CPU
if not HAS_TRANSFORMER_ENGINE:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    cpu.mend_distributed_adam(DistributedOptimizer)
    cpu.mend_router(moe_utils)
if RUNS_ON_CPU:
    cpu.mend_experts(token_dispatcher, mappings)


def unfused_column_parallel_linear() -> Any:
    """TransformerEngine's linear layer without the norm that its MLP description fuses into it."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def causal_past_the_prompt(attention: Any) -> Any:
    """Let TransformerEngine's attention stay causal when several tokens follow those in a cache.

    Megatron turns the mask off behind the first tokens of a sequence, counting on one token at a time.

    Args:
        attention: the class.

    Returns:
        A class like it.
    """

    class CausalPastThePrompt(attention):
        def forward(
            self, query: Any, key: Any, value: Any, attention_mask: Any, attn_mask_type: Any, **kwargs: Any
        ) -> Any:
            if attn_mask_type == AttnMaskType.no_mask and len(query) > 1:
                attn_mask_type = AttnMaskType.causal_bottom_right
            return super().forward(query, key, value, attention_mask, attn_mask_type=attn_mask_type, **kwargs)

    return CausalPastThePrompt


__all__ = [
    "HAS_TRANSFORMER_ENGINE",
    "MLP",
    "RUNS_ON_CPU",
    "AttnMaskType",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "GPTDataset",
    "GPTDatasetConfig",
    "GPTModel",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "LocalNonpersistentObject",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "RotaryEmbedding",
    "ShardedTensor",
    "Split",
    "StaticInferenceContext",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "VocabParallelCrossEntropy",
    "apply_factory_merges",
    "causal_past_the_prompt",
    "dict_list_map_inplace",
    "dist_checkpointing",
    "extract_sharded_base",
    "finalize_model_grads",
    "get_batch_on_this_cp_rank",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_moe_module_spec",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "is_main_replica",
    "load_preprocess",
    "make_moments",
    "make_sharded_tensors_for_checkpoint",
    "merge",
    "moe_router",
    "moe_utils",
    "nested_values",
    "parallel_state",
    "save_preprocess",
    "tensor_parallel",
    "unfused_column_parallel_linear",
]
