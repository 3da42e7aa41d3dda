"""The section `train` of a run's configuration: length, batch, precision, recomputation, spikes."""

from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.runtime.sections import at_least, one_of

DTYPES = ("float64", "float32", "bf16")
SPIKE_ACTIONS = ("report", "rollback")
RECOMPUTE = ("none", "selective", "full")
# Parts of a block that `selective` may compute again; the memory layer stands in the place of `mlp`. Of megatron's
# others, `layernorm` breaks without TransformerEngine and the rest are of layers that are not here.
RECOMPUTE_MODULES = ("core_attn", "mlp")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and intervals of a run; intervals are in steps, 0 means never.

    `micro_batch_size=0` takes the largest that the layout allows (see placement.py). A global batch that does
    not divide is filled up with padding (see data/batch_plan.py). `recompute` trades activations for computing them
    again in backward: all of every block (`full`), or the `recompute_modules` of each (`selective`).

    A step spikes when its loss exceeds `spike_factor` (0: never) times the median of the last `spike_window`
    losses, or when it is the last of `spike_skips` steps in a row that were not finite (see spikes.py).
    `spike_action` then is `report`, or `rollback`: the run goes back to the checkpoint before the spike and on
    with the data after it, at most `spike_max_rollbacks` times.

    Every `profile_interval` steps the time and bytes of each phase go into metrics.jsonl (see profile/interval.py).

    `time_limit_minutes` (0: none) counts from the launch: the run saves and ends before a step that might not leave
    the time to save (see launch/stopping.py). Ranks wait for each other for `collective_timeout` seconds.

    `trace_steps` records which slots the first steps of a launch read (see slot_recording.py).
    """

    steps: int = 100
    seed: int = 1
    global_batch_size: int = 24
    micro_batch_size: int = 1
    seq_length: int = 1024
    dtype: str = "float32"
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("mlp",)
    save_interval: int = 0
    keep_checkpoints: int = 2
    log_interval: int = 1
    heldout_interval: int = 0
    heldout_samples: int = 0
    spike_factor: float = 0.0
    spike_window: int = 100
    spike_skips: int = 5
    spike_action: str = "report"
    spike_max_rollbacks: int = 3
    peak_tflops: float = 0.0
    profile_interval: int = 0
    collective_timeout: int = 600
    time_limit_minutes: float = 0.0
    trace_steps: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        one_of("train", self, "dtype", DTYPES)
        at_least("train", self, 1, "global_batch_size", "seq_length", "log_interval")
        at_least("train", self, 1, "keep_checkpoints", "collective_timeout")
        at_least("train", self, 0, "steps", "seed", "save_interval", "heldout_interval", "heldout_samples")
        at_least("train", self, 0, "micro_batch_size", "spike_factor", "time_limit_minutes")
        at_least("train", self, 0, "profile_interval", "trace_steps")
        at_least("train", self, 1, "spike_window", "spike_skips", "spike_max_rollbacks")
        one_of("train", self, "spike_action", SPIKE_ACTIONS)
        self._check_spikes()
        if self.micro_batch_size > self.global_batch_size:
            raise ConfigError(
                f"train.micro_batch_size={self.micro_batch_size} exceeds train.global_batch_size="
                f"{self.global_batch_size}; the rest would be padding; lower it."
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        one_of("train", self, "recompute", RECOMPUTE)
        unknown = [name for name in self.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown or (self.recompute == "selective" and not self.recompute_modules):
            raise ConfigError(
                f"train.recompute_modules={list(self.recompute_modules)} with train.recompute={self.recompute}: "
                f"selective recomputation takes some of {', '.join(RECOMPUTE_MODULES)}; name one or more of these."
            )

    @property
    def runs_memory_again(self) -> bool:
        """Whether memory layers are computed again in backward, their exchange included."""
        return self.recompute == "full" or (self.recompute == "selective" and "mlp" in self.recompute_modules)

    def _check_spikes(self) -> None:
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"train.spike_factor={self.spike_factor} would call every other step a spike; it multiplies the median "
                "loss; use a number above 1, or 0 to turn it off."
            )
        if self.spike_action != "rollback":
            return
        if not self.spike_factor or not self.save_interval:
            raise ConfigError(
                f"train.spike_action=rollback with train.spike_factor={self.spike_factor} and train.save_interval="
                f"{self.save_interval}; a rollback needs spikes to be looked for and checkpoints to go back to; set "
                "both, or train.spike_action=report."
            )
        kept_steps = self.save_interval * (self.keep_checkpoints - 1)
        if self.spike_skips - 1 > kept_steps:
            raise ConfigError(
                f"train.spike_skips={self.spike_skips} steps may outlast train.keep_checkpoints="
                f"{self.keep_checkpoints} checkpoints at train.save_interval={self.save_interval}: the last one before "
                f"the spike would be deleted when it is found; keep more checkpoints, or use at most {kept_steps + 1}."
            )
