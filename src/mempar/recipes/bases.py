"""The base models of "Memory Layers at Scale" (arXiv 2412.09764): shapes, and what every recipe of a base shares.

Llama blocks with RMSNorm, SwiGLU and RoPE, and untied embeddings. The paper gives widths and totals; shapes are those
that reproduce its totals (720m's is inferred), 8b is that of Llama 3. Published too: 1T tokens, the vocabularies, where
memory layers stand. The configuration of its 373m models says sequences of 4096, theta 5e5, AdamW(.9, .95) with 1e-4
falling linearly to 1% after 4000 steps of warm-up, and 1T tokens in 128k steps: taken for all of them, with batches of
8M tokens. Chosen here: Llama 3's sequences of 8192 for 8b, how many GPUs, micro-batches and layouts.
"""

from dataclasses import dataclass

from mempar.recipes.data_sets import LLAMA2_MIX, LLAMA3_MIX, Mix
from mempar.runtime.config import ModelConfig

TOKENS = 10**12
TOKENS_PER_STEP = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base model.

    Attributes:
        model: its shape.
        stride: blocks from one memory layer of Memory+ to the next; the second stands in the middle.
        experts: of the mixture that has about as many parameters as memory models of this base; 0 for none.
        seq_length: tokens of a sample.
        micro_batch_size: samples that a rank computes at a time.
        mix: data and tokenizer.
        gpus: of the recipes with tables of at most 16M slots.
        tp: tensor-parallel size, inside a node.
    """

    model: ModelConfig
    stride: int
    experts: int = 0
    seq_length: int = 4096
    micro_batch_size: int
    mix: Mix = LLAMA2_MIX
    gpus: int
    tp: int = 1

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return TOKENS_PER_STEP // self.seq_length

    @property
    def middle(self) -> int:
        """The block in the middle, which memories of one layer replace."""
        return self.model.num_layers // 2


def _llama(hidden_size: int, num_layers: int, num_heads: int, ffn_hidden_size: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=num_heads,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=32000,
        rotary_base=500000,
    )


BASES = {
    "134m": Base(model=_llama(768, 12, 12, 2048), stride=4, experts=16, micro_batch_size=8, gpus=8),
    "373m": Base(model=_llama(1024, 24, 16, 2816), stride=8, experts=8, micro_batch_size=4, gpus=16),
    "720m": Base(model=_llama(1536, 22, 12, 4096), stride=8, experts=6, micro_batch_size=4, gpus=32),
    "1.3b": Base(model=_llama(2048, 22, 16, 5632), stride=8, experts=4, micro_batch_size=2, gpus=64),
    "8b": Base(
        model=ModelConfig(
            hidden_size=4096,
            num_layers=32,
            num_attention_heads=32,
            num_query_groups=8,
            ffn_hidden_size=14336,
            vocab_size=128256,
            rotary_base=500000,
        ),
        stride=8,
        seq_length=8192,
        micro_batch_size=1,
        mix=LLAMA3_MIX,
        gpus=128,
        tp=4,
    ),
}


def steps_of(tokens: int, *, global_batch_size: int, seq_length: int) -> int:
    """Steps that see so many tokens; the last one goes beyond them."""
    return -(-tokens // (global_batch_size * seq_length))
