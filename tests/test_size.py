"""Parameter counts against the built model, FLOPs against arithmetic."""

from typing import Any

import pytest

from mempar.memory.config import MemoryConfig
from mempar.runtime import bringup
from mempar.runtime.config import ModelConfig, RunConfig, TrainConfig
from mempar.runtime.model import build_model
from mempar.runtime.size import model_size
from rank_pool import RankPool

TOY = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}


def count_built(run: RunConfig) -> tuple[int, int]:
    """Parameters of the built model and elements of its table, in one process."""
    world = bringup.lay_out(run)
    model = build_model(run, world, 61)
    dense = sum(param.numel() for chunk in model.chunks for param in chunk.parameters())
    table = sum(table.shard.values.numel() for table in model.tables)
    bringup.tear_down(world)
    return dense, table


@pytest.mark.parametrize(
    ("tied", "memory"),
    [
        (False, {"enabled": False}),
        (True, {"variant": "memory", "layers": (2,)}),
        (False, {"layers": (1, 2, 3), "value_dim": 20, "qk_norm": True, "scalar_gate": True}),
        (False, {"variant": "peer", "layers": (1, 3)}),
        (False, {"layers": (1, 2), "beside": True}),
    ],
    ids=["dense", "memory", "memory_plus", "peer", "beside"],
)
def test_counts_equal_the_built_model(pool: RankPool, tied: bool, memory: dict[str, Any]) -> None:
    shape = {"num_subkeys": 8, "heads": 2, "top_k": 4, "key_dim": 8, "column_tile": 4}
    run = RunConfig(
        model=ModelConfig(**TOY, tie_embeddings=tied, vocab_multiple=8),
        memory=MemoryConfig(**shape, **memory),
        train=TrainConfig(seq_length=16),
    )
    [(dense, table)] = pool.run(1, count_built, run)
    size = model_size(run, 61)
    assert size.memory_params == table
    assert size.total_params == dense + table


def test_flops_do_not_count_table_values() -> None:
    model = ModelConfig(hidden_size=768, num_layers=12, num_attention_heads=12, ffn_hidden_size=2048)
    flops = [
        model_size(
            RunConfig(model=model, memory=MemoryConfig(layers=(4,), num_subkeys=1024, key_dim=384, top_k=top_k)), 32000
        ).flops_per_token
        for top_k in (8, 64)
    ]
    assert flops[0] == flops[1]
    dense = model_size(RunConfig(model=model), 32000).flops_per_token
    # Six FLOPs a multiplied parameter, and the two products of causal attention.
    attention = 12 * 4 * 768 * 768
    feed_forward = 12 * 3 * 768 * 2048
    assert dense == 6 * (attention + feed_forward + 32000 * 768 + 12 * 1024 * 768)
