"""The model: megatron's GPT with memory layers in chosen blocks, reading a table cut over ranks.

Here the two blind rooms meet: `memory` says what a layer computes and asks a reader for rows,
`parallel` reads rows wherever they lie. The table stands beside the model, not in it: megatron would
cast it, broadcast it and give it a dense gradient.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.memory.layer import MemoryLayer, SlotHook
from mempar.memory.lookup import LocalReader, RowReader, SilentReader
from mempar.memory.values import ValueShard
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.token_split import TokenSplitReader
from mempar.runtime import mcore
from mempar.runtime.blocks import CausalAttention, RMSNorm
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import initial_value, logical_parameters

TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}

# Given a 0-based block number, the hook that records or replays its choices, or None.
HookFactory = Callable[[int, int, int], SlotHook | None]


class TableAccess:
    """How the memory layers of this rank reach the table; one for all of them.

    Attributes:
        reader: where rows come from.
        hook_factory: called with (block, sequence length, batch) before every lookup; recording or
            replaying slot choices in tests and studies.
    """

    def __init__(self, reader: RowReader, num_members: int) -> None:
        self.reader = reader
        self.num_members = num_members
        self.hook_factory: HookFactory | None = None


class MemoryMLP(MemoryLayer):
    """A memory layer with the signature of megatron's MLP."""

    def __init__(self, config: Any, run: RunConfig, access: TableAccess, **kwargs: Any) -> None:
        """Take megatron's configuration, and ours through the block's description."""
        super().__init__(run.memory, run.model.hidden_size, run.model.norm_epsilon)
        self.to(config.params_dtype)
        self.access = access
        self.block = -1
        for param in self.parameters():
            # Dense parts see a share of the sequence: megatron sums these gradients over tensor ranks.
            param.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the 1-based global number of the block; megatron calls this."""
        self.block = layer_number - 1

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Look up.

        Args:
            hidden_states: `[s, b, C]`, RMS-normed; a share of the sequence under sequence parallelism.
            padding_mask: megatron's, unused.

        Returns:
            `[s, b, C]` and no bias.
        """
        length, batch, width = hidden_states.shape
        hook = None
        if self.access.hook_factory is not None:
            hook = self.access.hook_factory(self.block, length, batch)
        # Every member of the memory-parallel group runs the same schedule, so it holds as many tokens.
        counts = [length * batch] * self.access.num_members
        out = super().forward(hidden_states.reshape(-1, width), self.access.reader, hook, counts)
        return out.view(length, batch, width), None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The chunks of the model that this rank holds, and its shard of the table.

    Attributes:
        chunks: one GPTModel for each virtual stage, as built.
        wrapped: the same, wrapped for training (Float16Module, DDP).
        transformer: megatron's configuration.
        table: this rank's shard; None on stages without memory layers.
        access: how its layers reach the table; None likewise.
    """

    chunks: list[Any]
    wrapped: list[Any]
    transformer: Any
    table: ValueShard | None
    access: TableAccess | None

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Let every lookup return zeros for a while."""
        if self.access is None or self.table is None:
            yield
            return
        reader = self.access.reader
        self.access.reader = SilentReader(self.table.part.value_dim)
        try:
            yield
        finally:
            self.access.reader = reader


def transformer_config(run: RunConfig) -> Any:
    """Translate a run into megatron's configuration."""
    model, sizes = run.model, run.parallel
    dtype = TORCH_DTYPES[run.train.dtype]
    vpp = sizes.vpp if sizes.vpp > 1 else None
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
        # Megatron marks tensor-parallel parameters only while initialising them; the values are ours (logical.py).
        perform_initialization=True,
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
    )


def _block_specs(run: RunConfig, transformer: Any, access: TableAccess | None, vp_stage: int | None) -> Any:
    """Megatron's description of this chunk's blocks, memory blocks among them."""
    if mcore.HAS_TRANSFORMER_ENGINE:
        dense: Any = mcore.get_gpt_layer_with_transformer_engine_spec()
    else:
        dense = mcore.get_gpt_layer_local_spec(normalization="RMSNorm")
        dense.submodules.input_layernorm = RMSNorm
        dense.submodules.pre_mlp_layernorm = RMSNorm
        dense.submodules.self_attention.submodules.core_attention = CausalAttention
    memory = copy.deepcopy(dense)
    # With TransformerEngine the norm is fused into the MLP that is replaced here: name it.
    memory.submodules.pre_mlp_layernorm = RMSNorm
    memory.submodules.mlp = mcore.ModuleSpec(module=MemoryMLP, params={"run": run, "access": access})
    chosen = set(run.memory.layers) if run.memory.enabled else set()
    first = mcore.get_transformer_layer_offset(transformer, vp_stage)
    count = mcore.get_num_layers_to_build(transformer, vp_stage)
    specs = [memory if block in chosen else dense for block in range(first, first + count)]
    norm: Any = RMSNorm
    return mcore.TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _build_chunk(run: RunConfig, transformer: Any, access: TableAccess | None, vocab: int, vp_stage: int | None) -> Any:
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
    with torch.no_grad():
        for logical in logical_parameters(chunk, tp=run.parallel.tp, tp_rank=state.get_tensor_model_parallel_rank()):
            whole = initial_value(
                logical.name,
                logical.shape,
                seed=run.train.seed,
                init_std=run.model.init_std,
                num_layers=run.model.num_layers,
            )
            logical.param.copy_(logical.share_of(whole))
    return chunk


def _table_access(run: RunConfig, world: World) -> tuple[ValueShard | None, TableAccess | None]:
    placement = world.placement
    if placement.plan is None or world.groups is None or not world.holds_table:
        return None, None
    group = world.groups.memory
    table = ValueShard(
        placement.plan.part_of(group.rank),
        seed=run.train.seed,
        dtype=TORCH_DTYPES[run.table_dtype],
        device=world.device,
        deposit_bytes=run.memory.deposit_bytes,
    )
    reader: RowReader = LocalReader(table) if group.size == 1 else ShardedReader(table, placement.plan, group)
    grid = placement.grid
    if grid.tp > 1 and not run.parallel.sequence_parallel:
        members = next((ranks for ranks in grid.memory_groups() if world.rank in ranks), [world.rank])
        reader = TokenSplitReader(reader, world.groups.tensor, [grid.tp_rank(member) for member in members])
    return table, TableAccess(reader, group.size)


def build_model(run: RunConfig, world: World, vocab_size: int) -> Model:
    """Build this rank's part of the model and its shard of the table, with initial values.

    Args:
        run: the run.
        world: the ranks and groups it runs on.
        vocab_size: tokens of the tokenizer, before padding.
    """
    transformer = transformer_config(run)
    table, access = _table_access(run, world)
    vp_stages = [None] if run.parallel.vpp == 1 else list(range(run.parallel.vpp))
    vocab = run.model.padded_vocab(vocab_size)
    chunks = [_build_chunk(run, transformer, access, vocab, vp_stage).to(world.device) for vp_stage in vp_stages]
    wrapped = chunks
    if transformer.bf16:
        wrapped = [mcore.Float16Module(transformer, chunk) for chunk in chunks]
    ddp = mcore.DistributedDataParallelConfig(
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        grad_reduce_in_fp32=run.train.dtype != "float64",
        overlap_grad_reduce=False,
    )
    wrapped = [
        mcore.DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=place > 0)
        for place, chunk in enumerate(wrapped)
    ]
    return Model(chunks=chunks, wrapped=wrapped, transformer=transformer, table=table, access=access)
