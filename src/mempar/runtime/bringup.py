"""From the environment to a laid-out world: device, backend, megatron's parallel state, our groups.

This is the one place of the runtime that reads environment variables (those that torchrun sets).
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.kernels.dispatch import Backend, choose_backend
from mempar.marks import CudaClock, HostClock, Marks
from mempar.parallel.groups import MemoryGroups, make_memory_groups
from mempar.runtime import mcore
from mempar.runtime.config import RunConfig
from mempar.runtime.float64 import keep_wide_logits, keep_wide_routing
from mempar.runtime.placement import Placement, place


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run, laid out.

    Attributes:
        rank: this rank.
        size: number of ranks.
        device: where this rank computes.
        backend: what computes the operations of memory layers.
        placement: sizes of the dimensions, the tables' cuts and stages.
        groups: the memory dimension's groups; None for a dense model.
        made_groups: torch groups to be destroyed at the end.
        marks: take the time of phases in steps for which they are turned on.
    """

    rank: int
    size: int
    device: torch.device
    backend: Backend
    placement: Placement
    groups: MemoryGroups | None
    made_groups: list[dist.ProcessGroup]
    marks: Marks

    def holds(self, memory: str) -> bool:
        """Whether this rank's stage holds a shard of a memory's tables."""
        return self.placement.grid.stage_of(self.rank) in self.placement.memories[memory].stages

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what there is one of."""
        return self.rank == 0


def join_world(timeout_seconds: int = 600, *, alone: bool = False) -> None:
    """Join the process group that torchrun's environment variables describe; alone without them, or if asked to."""
    # megatron counts on it to order a tensor-parallel reduction before the matmul that hides it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise ConfigError(
                f"{local_world} ranks on this machine and {torch.cuda.device_count()} CUDA devices; every rank needs a "
                "device of its own; use a smaller layout, or CUDA_VISIBLE_DEVICES= to run on the CPU."
            )
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    elif "OMP_NUM_THREADS" not in os.environ or local_world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and not alone:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def lay_out(run: RunConfig) -> World:
    """Lay a run out on the joined world; every rank must call it.

    Raises:
        ConfigError: on every rank, before any group is made, when the run cannot be laid out.
    """
    check_engine(run)
    rank, size = dist.get_rank(), dist.get_world_size()
    placement = place(run, size)
    sizes = run.parallel
    # Declared as whole minutes, passed to a timedelta that takes parts of them.
    minutes: Any = run.train.collective_timeout / 60
    mcore.parallel_state.initialize_model_parallel(
        sizes.tp,
        sizes.pp,
        sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.tp,
        distributed_timeout_minutes=minutes,
    )
    mcore.tensor_parallel.model_parallel_cuda_manual_seed(run.train.seed)
    torch.manual_seed(run.train.seed)
    if run.train.dtype == "float64":
        keep_wide_logits(mcore.VocabParallelCrossEntropy)
        keep_wide_routing(mcore.moe_router)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    marks = Marks(CudaClock() if device.type == "cuda" else HostClock())
    groups, made = None, []
    if run.memories:
        tensor_group: Any = mcore.parallel_state.get_tensor_model_parallel_group() if sizes.tp > 1 else None
        groups, made = make_memory_groups(
            placement.grid,
            rank,
            [memory.stages for memory in placement.memories.values()],
            tensor_group,
            timeout=datetime.timedelta(seconds=run.train.collective_timeout),
            marks=marks,
        )
    return World(
        rank=rank,
        size=size,
        device=device,
        backend=choose_backend(run.kernels.backend, device.type, check_indices=run.kernels.check_indices),
        placement=placement,
        groups=groups,
        made_groups=made,
        marks=marks,
    )


def check_engine(run: RunConfig) -> None:
    """Refuse what this machine's engine would do wrongly or not at all."""
    if run.parallel.cp > 1 and not mcore.HAS_TRANSFORMER_ENGINE:
        raise ConfigError(
            f"parallel.cp={run.parallel.cp} needs TransformerEngine's attention, which is not usable here; without it "
            "megatron's attention sees one context-parallel rank's tokens only; use parallel.cp=1, or a CUDA machine "
            "with transformer-engine."
        )


def tear_down(world: World) -> None:
    """Destroy the groups that `lay_out` made, so that the process may lay out another run."""
    for group in world.made_groups:
        dist.destroy_process_group(group)
    mcore.parallel_state.destroy_model_parallel()
    # Its cache of angles keeps modules, and with them process groups and their threads, alive.
    mcore.RotaryEmbedding.forward.cache_clear()
    # So does its record of balance losses with groups.
    mcore.moe_utils.get_moe_layer_wise_logging_tracker().clear()
