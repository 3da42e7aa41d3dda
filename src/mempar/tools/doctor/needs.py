"""What a recipe wants of machines and disks: ranks, bytes of a checkpoint, seconds of a step."""

import json
from dataclasses import dataclass
from pathlib import Path

from mempar.runtime.checkpoint.size import checkpoint_size
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.hardware import Gpu
from mempar.runtime.placement import place, resolve
from mempar.runtime.run_dir import RunDir
from mempar.runtime.size import model_size

# Of the peak: nobody's run is faster, so that a step is no shorter than this.
_BEST_SHARE = 0.6
# Gradients beside weights and state, on a CPU.
_GRADIENT_SHARE = 1 / 3
# Lines of metrics.jsonl that are looked at, from its end.
_NUM_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run wants; the defaults are those of no run in particular.

    Attributes:
        name: of the recipe; empty without one.
        gpu: it is for; None for a CPU.
        world: its ranks.
        num_nodes: over which they are spread.
        checkpoint_bytes: of one checkpoint; 0 if it is not known.
        keep: checkpoints kept.
        save_interval: steps between two.
        asynchronous: whether training goes on while one is written.
        limit_seconds: train.time_limit_minutes; 0 is none.
        step_seconds: of a step: measured where the run has begun, or the least that its GPUs can do; 0 if unknown.
        is_measured: whether that was measured.
        context_parallel: size.
        kernels: kernels.backend.
        problem: why its checkpoints' size is not known.
    """

    name: str = ""
    gpu: Gpu | None = None
    world: int = 1
    num_nodes: int = 1
    checkpoint_bytes: int = 0
    keep: int = 0
    save_interval: int = 0
    asynchronous: bool = False
    limit_seconds: float = 0.0
    step_seconds: float = 0.0
    is_measured: bool = False
    context_parallel: int = 1
    kernels: str = "auto"
    problem: str = ""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one machine."""
        return -(-self.world // self.num_nodes)

    @property
    def host_bytes(self) -> float:
        """Least of a machine's own memory that its ranks take: the model on a CPU, a copy of it to save beside."""
        share = self.checkpoint_bytes / self.num_nodes
        if self.gpu is None:
            return share * (1 + _GRADIENT_SHARE + self.asynchronous)
        return share if self.asynchronous else 0.0


def needs_of(run: RunConfig, root: Path, ranks_per_node: int | None, nodes: int = 1) -> Needs:
    """What a recipe wants.

    Args:
        run: the recipe.
        root: directory of the run; what was measured there counts.
        ranks_per_node: as the user gives it; by default those of the GPU's usual machine, or all on one.
        nodes: that there are for it at the least.

    Raises:
        ConfigError: when it cannot be laid out on the ranks that it is for.
    """
    world, gpu = run.num_gpus, run.hardware.kind
    if ranks_per_node is not None and not run.hardware.gpus:
        world = max(world, ranks_per_node * nodes)
    run = resolve(run, world)
    place(run, world)
    per_node = min(world, ranks_per_node or (gpu.gpus_per_node if gpu else world))
    num_bytes, problem = _checkpoint_bytes(run)
    measured = measured_step(RunDir(root).metrics)
    return Needs(
        name=run.name,
        gpu=gpu,
        world=world,
        num_nodes=-(-world // per_node),
        checkpoint_bytes=num_bytes,
        keep=run.train.keep_checkpoints,
        save_interval=run.train.save_interval,
        asynchronous=run.checkpoint.asynchronous,
        limit_seconds=60 * run.train.time_limit_minutes,
        step_seconds=measured or _least_step(run, world),
        is_measured=measured > 0,
        context_parallel=run.parallel.cp,
        kernels=run.kernels.backend,
        problem=problem,
    )


def measured_step(metrics: Path) -> float:
    """Seconds of the last steps of a run, by its metrics.jsonl; 0 if there are none."""
    seconds = []
    try:
        lines = metrics.read_text().splitlines()[-_NUM_STEPS:]
    except (OSError, UnicodeDecodeError):
        return 0.0
    for line in lines:
        try:
            row = json.loads(line)
            seconds.append(float(row["seconds"]))
        except (ValueError, KeyError, TypeError):
            # Rows of evaluations, and one cut short.
            continue
    return sorted(seconds)[len(seconds) // 2] if seconds else 0.0


def _checkpoint_bytes(run: RunConfig) -> tuple[int, str]:
    try:
        return checkpoint_size(run, vocab_size(run)).total, ""
    # A tokenizer that cannot be read here, or a torch that cannot be imported: the rest can be looked at all the same.
    except Exception as error:
        return 0, str(error) or type(error).__name__


def _least_step(run: RunConfig, world: int) -> float:
    gpu = run.hardware.kind
    if gpu is None:
        return 0.0
    try:
        flops = model_size(run, vocab_size(run)).flops_per_token
    except Exception:
        return 0.0
    tokens = run.train.global_batch_size * run.train.seq_length
    return flops * tokens / (world * gpu.bf16_tflops * 1e12 * _BEST_SHARE)
