"""The section `checkpoint` of a run's configuration: how checkpoints are written."""

from dataclasses import dataclass

from mempar.errors import ConfigError

_LEAST_BLOCK_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written; when, and how many are kept, says `train`.

    Attributes:
        asynchronous: copy to host memory, and write while training goes on.
        block_bytes: size of a table's row block, the unit that is checked and read; at least one row.
        threads: of each rank, writing.
    """

    asynchronous: bool = False
    block_bytes: int = 128 << 20
    threads: int = 2

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.block_bytes < _LEAST_BLOCK_BYTES:
            raise ConfigError(
                f"checkpoint.block_bytes={self.block_bytes} must be at least {_LEAST_BLOCK_BYTES}: every block has an "
                "entry in the checkpoint's manifest; raise it."
            )
        if not 1 <= self.threads <= 64:
            raise ConfigError(f"checkpoint.threads={self.threads} must be between 1 and 64; choose such a number.")
