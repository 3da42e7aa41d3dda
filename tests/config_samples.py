"""Small configs that tests of configs start from."""

from mempar.memory.config import MemoryConfig
from mempar.runtime.config import ModelConfig, RunConfig, TrainConfig

MODEL = ModelConfig(num_layers=24, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96)
MEMORY = MemoryConfig(layers=(4, 12, 20), num_subkeys=8, heads=2, top_k=4, key_dim=8, column_tile=8)
BASE = RunConfig(model=MODEL, memory=MEMORY, train=TrainConfig(global_batch_size=48, seq_length=32))
