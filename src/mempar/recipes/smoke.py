"""The smoke recipe: a small byte-level model with Memory+ on text that every machine has.

It trains in about two and a half minutes on two cores, beats trigram counts, and divides over many layouts:
24 samples a step, four blocks for two stages of two virtual ones, heads and widths for tp=2.
"""

from mempar.memory.config import MemoryConfig
from mempar.runtime.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def smoke() -> RunConfig:
    """Documentation and sources of Python's standard library, and the Unicode character names."""
    return RunConfig(
        name="smoke",
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=768,
            init_std=0.05,
        ),
        memory=MemoryConfig(
            variant="memory_plus",
            layers=(1, 2, 3),
            num_subkeys=128,
            heads=4,
            top_k=8,
            key_dim=64,
            column_tile=16,
            optimizer="row_adam",
            lr=1e-2,
            weight_decay=0.0,
        ),
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, schedule="cosine", weight_decay=0.1, clip_grad=1.0),
        train=TrainConfig(
            steps=180,
            seed=1,
            global_batch_size=24,
            micro_batch_size=0,
            seq_length=128,
            dtype="float32",
            log_interval=10,
            heldout_samples=96,
        ),
        data=DataConfig(corpus="stdlib", tokenizer="byte", trigram_baseline=True),
    )
