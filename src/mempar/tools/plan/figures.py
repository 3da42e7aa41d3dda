"""The figures of a plan that people ask for: tokens a second, share of the peak, days, GPU-hours."""

from dataclasses import dataclass

from mempar.runtime.config import RunConfig
from mempar.runtime.hardware import Hardware
from mempar.runtime.size import model_size
from mempar.tools.plan.roofline import Roofline
from mempar.tools.plan.search import Plan

_DAY, _HOUR = 86400.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one plan.

    Attributes:
        tokens_per_second_per_gpu: of the global batch, padding not counted.
        mfu: FLOPs of the model, over the peak of all GPUs: those of size.py but for the backward pass of half keys'
            scores, which touches the chosen keys alone; what is computed again does not count.
        memory_share: of a GPU's memory, on the rank that needs most.
        tokens: that the run sees.
        days: that it takes, without checkpoints, evaluation and what goes wrong.
        gpu_hours: likewise.
    """

    tokens_per_second_per_gpu: float
    mfu: float
    memory_share: float
    tokens: int
    days: float
    gpu_hours: float


def figures_of(plan: Plan, hardware: Hardware) -> Figures:
    """Figures of a plan."""
    layout, seconds = plan.layout, plan.time.seconds
    run, num_gpus = layout.run, layout.grid.world
    step_tokens = run.train.global_batch_size * run.train.seq_length
    flops = (model_size(run, layout.vocab).flops_per_token - 4 * _key_products(run)) * step_tokens
    peak = Roofline(hardware, layout.value_bytes).peak_tflops * 1e12
    total = run.train.steps * seconds
    return Figures(
        tokens_per_second_per_gpu=step_tokens / seconds / num_gpus,
        mfu=flops / seconds / num_gpus / peak,
        memory_share=plan.memory_bytes / hardware.memory_bytes,
        tokens=run.train.steps * step_tokens,
        days=total / _DAY,
        gpu_hours=total / _HOUR * num_gpus,
    )


def _key_products(run: RunConfig) -> int:
    """Multiply-adds of a token's queries with all half keys."""
    return sum(
        len(memory.layers) * memory.heads * 2 * memory.num_subkeys * memory.half_key_dim
        for memory in run.memories.values()
    )
