"""What a study consists of: facts, models, training, how often is asked."""

import dataclasses
from dataclasses import dataclass

from mempar.errors import ConfigError

# What the study itself counts by; the engine looks at the rest.
_COUNTS = ("facts", "seq_length", "steps", "batch_size", "evaluation_interval", "asked")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a study's results, beside versions of software.

    Attributes:
        facts: how many there are to be learned.
        fact_seed: of their choice, of held-out wordings and of the corpus.
        vocab_size: tokens of the study's tokenizer, at the most.
        seq_length: tokens of a document, which is a sample.
        steps: of each run.
        batch_size: samples a step.
        micro_batch_size: samples at a time; 0 takes all of a step.
        dtype: of training.
        hidden_size: C of every model.
        num_layers: L of every model.
        attention_heads: of every block.
        ffn_hidden_size: width of the dense model's feed-forward networks; those of others follow from it.
        init_std: of dense weights.
        lr: peak learning rate of dense parameters.
        lr_of: the same of some variants, by their names, where another one suits them better.
        final_lr_share: what is left of it at the end.
        warmup_steps: until it is reached.
        schedule: of all rates.
        weight_decay: of dense parameters; values have none.
        memory_layers: blocks of `memory` and `peer`.
        memory_plus_layers: blocks of `memory_plus`.
        memory_heads: H.
        top_k: K.
        key_dim: 2Q.
        qk_norm: whether queries and keys are normalised.
        values_lr: peak learning rate of tables' values.
        balance_loss: coefficient of the loss that asks for even use, of experts and of tables.
        evaluation_interval: steps between evaluations.
        asked: facts that are asked for at an evaluation before the last, which asks for all.

    Raises:
        ConfigError: for a number that counts nothing.
    """

    facts: int
    fact_seed: int = 1
    vocab_size: int = 1024
    seq_length: int = 64
    steps: int
    batch_size: int = 32
    micro_batch_size: int = 0
    dtype: str = "float32"
    hidden_size: int = 24
    num_layers: int = 3
    attention_heads: int = 2
    ffn_hidden_size: int = 64
    init_std: float = 0.05
    lr: float = 1e-2
    lr_of: dict[str, float] = dataclasses.field(default_factory=dict)
    final_lr_share: float = 0.1
    warmup_steps: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.1
    memory_layers: tuple[int, ...] = (1,)
    memory_plus_layers: tuple[int, ...] = (1,)
    memory_heads: int = 2
    top_k: int = 8
    key_dim: int = 16
    qk_norm: bool = True
    values_lr: float = 0.05
    balance_loss: float = 0.01
    evaluation_interval: int = 250
    asked: int = 1000

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} leaves nothing to do; it counts from 1; raise it.")
        for name in ("fact_seed", "init_std"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative; it is at least 0; raise it.")
        if not 0 <= self.final_lr_share <= 1:
            raise ConfigError(
                f"final_lr_share={self.final_lr_share} is no share; rates end between nothing and their peak; give a "
                "number from 0 to 1."
            )

    @property
    def tokens(self) -> int:
        """Tokens of a run."""
        return self.steps * self.batch_size * self.seq_length

    def to_json(self) -> dict:
        """The settings by name, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }
