"""The model: megatron's GPT with memory layers or experts in chosen blocks."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from mempar.runtime import mcore
from mempar.runtime.blocks import CausalAttention, RMSNorm
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.experts import expert_module, expert_settings, keep_apart
from mempar.runtime.in_flight import InFlight
from mempar.runtime.initial import initial_value
from mempar.runtime.logical import own_parameters
from mempar.runtime.memory_mlp import MemoryMLP, MLPWithMemory
from mempar.runtime.tables import TORCH_DTYPES, HookFactory, Table, TableAccess, make_tables


@dataclass(frozen=True, kw_only=True)
class Model:
    """The chunks of the model that this rank holds, and its shards of the tables.

    Attributes:
        chunks: one GPTModel for each virtual stage, as built.
        wrapped: the same, wrapped for training (Float16Module, DDP).
        transformer: megatron's configuration.
        in_flight: which micro-batch is being computed.
        tables: this rank's shards, in global order; none on stages without memory layers.
        access: how the layers of each memory reach its tables, by the memory's name.
    """

    chunks: list[Any]
    wrapped: list[Any]
    transformer: Any
    in_flight: InFlight
    tables: list[Table]
    access: dict[str, TableAccess]

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Let every lookup return zeros for a while."""
        readers = {name: access.silence() for name, access in self.access.items()}
        try:
            yield
        finally:
            for name, access in self.access.items():
                access.readers = readers[name]

    def hook_slots(self, factory: HookFactory | None) -> None:
        """Let a factory of hooks see, or decide, which slots the layers choose; None ends it."""
        for access in self.access.values():
            access.hook_factory = factory


def transformer_config(run: RunConfig, *, draws: bool = True) -> Any:
    """Translate a run into megatron's configuration.

    Args:
        run: the run.
        draws: whether parameters get values when they are made.
    """
    model, sizes = run.model, run.parallel
    dtype = TORCH_DTYPES[run.train.dtype]
    vpp = sizes.vpp if sizes.vpp > 1 else None
    with warnings.catch_warnings():
        # That fused attention need not be computed again is for those who name core_attn to judge.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        return mcore.TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            ffn_hidden_size=model.ffn_hidden_size,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_epsilon,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=run.train.dtype == "bf16",
            params_dtype=dtype,
            pipeline_dtype=dtype,
            # Megatron marks tensor-parallel parameters only while initialising them; the values are ours (initial.py).
            perform_initialization=draws,
            use_cpu_initialization=mcore.RUNS_ON_CPU,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=sizes.cp,
            sequence_parallel=sizes.sequence_parallel,
            calculate_per_token_loss=True,
            # Interleaving over two stages is silently wrong without overlapped p2p, and plain 1F1B refuses it.
            overlap_p2p_comm=vpp is not None,
            batch_p2p_comm=vpp is None,
            # Its default says the same thing with a deprecation warning.
            cuda_graph_scope=[],
            **_recomputation(run),
            **expert_settings(run),
        )


def _recomputation(run: RunConfig) -> dict[str, Any]:
    """Megatron's settings of what is computed again in backward.

    Only what every rank does alike whatever the data, block by block: the exchange of memory layers runs again
    with it. So no partial checkpoints by micro-batch, and saved activations stay with their rank.
    """
    if run.train.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if run.train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(run.train.recompute_modules)}
    return {}


def _block_specs(run: RunConfig, transformer: Any, access: dict[str, TableAccess], vp_stage: int | None) -> Any:
    """Megatron's description of this chunk's blocks, dense, memory or experts, block by block."""
    dense = _dense_spec()
    first = mcore.get_transformer_layer_offset(transformer, vp_stage)
    count = mcore.get_num_layers_to_build(transformer, vp_stage)
    # Of this chunk's blocks only: a stage reaches no tables but those of its own layers.
    here = range(first, first + count)
    memory_of = {block: name for name, memory in run.memories.items() for block in memory.layers if block in here}
    chosen = {block: _memory_spec(run, dense, name, access) for block, name in memory_of.items()}
    if run.moe_layers:
        chosen |= dict.fromkeys(run.moe_layers, _replacing(dense, expert_module(run)))
    specs = [chosen.get(block, dense) for block in here]
    norm: Any = RMSNorm
    return mcore.TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _dense_spec() -> Any:
    if mcore.HAS_TRANSFORMER_ENGINE:
        spec: Any = mcore.get_gpt_layer_with_transformer_engine_spec()
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = mcore.causal_past_the_prompt(attention.core_attention)
        return spec
    dense: Any = mcore.get_gpt_layer_local_spec(normalization="RMSNorm")
    dense.submodules.input_layernorm = RMSNorm
    dense.submodules.pre_mlp_layernorm = RMSNorm
    dense.submodules.self_attention.submodules.core_attention = CausalAttention
    return dense


def _memory_spec(run: RunConfig, dense: Any, name: str, access: dict[str, TableAccess]) -> Any:
    """Describe a block whose feed-forward network is replaced, or accompanied, by a memory layer."""
    given = {"run": run, "memory": run.memories[name], "access": access[name]}
    if not run.memories[name].beside:
        return _replacing(dense, mcore.ModuleSpec(module=MemoryMLP, params=given))
    submodules = copy.deepcopy(dense.submodules.mlp.submodules)
    if mcore.HAS_TRANSFORMER_ENGINE:
        submodules.linear_fc1 = mcore.unfused_column_parallel_linear()
    return _replacing(dense, mcore.ModuleSpec(module=MLPWithMemory, submodules=submodules, params=given))


def _replacing(dense: Any, mlp: Any) -> Any:
    """Describe a block with something else where a dense one has its MLP."""
    spec = copy.deepcopy(dense)
    # With TransformerEngine the norm is fused into the MLP that is replaced here: name it.
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp = mlp
    return spec


def _build_chunk(
    run: RunConfig, transformer: Any, access: dict[str, TableAccess], vocab: int, vp_stage: int | None
) -> Any:
    state = mcore.parallel_state
    plain = vp_stage is None
    chunk = mcore.GPTModel(
        config=transformer,
        transformer_layer_spec=_block_specs(run, transformer, access, vp_stage),
        vocab_size=vocab,
        max_sequence_length=run.train.seq_length,
        pre_process=state.is_pipeline_first_stage(ignore_virtual=plain, vp_stage=vp_stage),
        post_process=state.is_pipeline_last_stage(ignore_virtual=plain, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=run.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        vp_stage=vp_stage,
    )
    keep_apart(chunk)
    return chunk


def build_model(run: RunConfig, world: World, vocab_size: int) -> Model:
    """Build this rank's part of the model and its shards of the tables, with initial values, to be trained.

    Args:
        run: the run.
        world: the ranks and groups it runs on.
        vocab_size: tokens of the tokenizer, before padding.
    """
    in_flight = InFlight(runs_again=run.train.runs_memory_again)
    tables, access = make_tables(run, world, in_flight)
    transformer = transformer_config(run)
    vocab = run.model.padded_vocab(vocab_size)
    model = _assemble(run, world, transformer, vocab, in_flight, tables, access)
    _draw(run, model.chunks)
    ddp = mcore.DistributedDataParallelConfig(
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        grad_reduce_in_fp32=run.train.dtype != "float64",
        overlap_grad_reduce=False,
    )
    wrapped = [
        mcore.DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=place > 0)
        for place, chunk in enumerate(model.wrapped)
    ]
    return replace(model, wrapped=wrapped)


def build_for_reading(
    run: RunConfig,
    world: World,
    padded_vocab: int,
    *,
    in_flight: InFlight,
    tables: list[Table],
    access: dict[str, TableAccess],
) -> Model:
    """Build a model that is only read: nothing is drawn, and there are no buffers for gradients.

    Args:
        run: the run.
        world: the ranks and groups it runs on.
        padded_vocab: embeddings.
        in_flight: what the layers compute.
        tables: those that lie in memory.
        access: how the layers of each memory reach its tables.

    Returns:
        The model, whose parameters have yet to be filled.
    """
    transformer = transformer_config(run, draws=False)
    model = _assemble(run, world, transformer, padded_vocab, in_flight, tables, access)
    for chunk in model.chunks:
        chunk.requires_grad_(False).eval()
    return model


def _assemble(
    run: RunConfig,
    world: World,
    transformer: Any,
    vocab: int,
    in_flight: InFlight,
    tables: list[Table],
    access: dict[str, TableAccess],
) -> Model:
    vp_stages = [None] if run.parallel.vpp == 1 else list(range(run.parallel.vpp))
    chunks = [_build_chunk(run, transformer, access, vocab, vp_stage).to(world.device) for vp_stage in vp_stages]
    wrapped = [mcore.Float16Module(transformer, chunk) for chunk in chunks] if transformer.bf16 else chunks
    return Model(
        chunks=chunks, wrapped=wrapped, transformer=transformer, in_flight=in_flight, tables=tables, access=access
    )


@torch.no_grad()
def _draw(run: RunConfig, chunks: list[Any]) -> None:
    """Give all parameters their initial values."""
    for logical in own_parameters(chunks):
        whole = initial_value(
            logical.name,
            logical.shape,
            seed=run.train.seed,
            init_std=run.model.init_std,
            num_layers=run.model.num_layers,
        )
        logical.param.copy_(logical.share_of(whole))
