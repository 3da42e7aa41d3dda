"""A rank that tries out collectives: `torchrun ... -m mempar.tools.doctor.smoke_rank --reports DIR`.

It takes the backend that training would take, checks what every collective delivers, measures one size and the clocks,
and says in `DIR/rank_XXXXX.json` how far it came; the directory is shared where ranks run on several hosts. Whoever
waits too long ends itself. Who started the ranks, and what their reports mean, is not known here (see smoke.py).
"""

import argparse
import datetime
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mempar.runtime.launch.parent import die_with
from mempar.tools.doctor.environment import RankPlace, rank_place

if TYPE_CHECKING:
    import torch

# In order; every rank passes all of them.
STAGES = (
    "starting", "joining", "barrier", "all_reduce", "all_to_all bf16", "all_to_all float64", "clocks", "bandwidth",
    "leaving", "done",
)  # fmt: skip
# Bytes of a measured collective: what gradients and rows come in, where a link rather than its latency counts.
_CPU_BYTES, _CUDA_BYTES = 8 << 20, 256 << 20
_NUM_ROUNDS = 5
# Of what was raised, in characters.
_ERROR_LENGTH = 240
# After giving up, in seconds.
_LINGER_SECONDS = 10.0
# The process group gives up later than the rank does, which then still says where it was.
_LATER = 2


@dataclass(kw_only=True)
class Report:
    """What one rank says.

    Attributes:
        rank: its number.
        world: ranks in all.
        host: where it runs.
        stage: what it is doing.
        backend: of its collectives.
        wrong: collectives that delivered something else than they should.
        error: what it raised.
        waited: whether it ended itself, for waiting too long.
        seconds: of one collective of `num_bytes`, by its name.
        num_bytes: of those.
        offset: seconds that this clock is ahead of rank 0's.
        uncertainty: of that.
    """

    rank: int
    world: int
    host: str
    stage: str = STAGES[0]
    backend: str = ""
    wrong: list[str] = field(default_factory=list)
    error: str = ""
    waited: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    offset: float = 0.0
    uncertainty: float = 0.0

    @property
    def progress(self) -> int:
        """How many stages lie behind it."""
        return STAGES.index(self.stage)


class Rank:
    """One rank on its way through the stages."""

    def __init__(self, place: RankPlace, directory: Path, patience: float, node: str = "") -> None:
        """Describe it, and say that it is there.

        Args:
            place: which one it is.
            directory: for reports.
            patience: seconds that it waits for others, in all.
            node: name of where it runs; its host's own unless given.
        """
        self.place, self.patience = place, patience
        self.report = Report(rank=place.rank, world=place.world, host=node or socket.gethostname())
        self._path = directory / f"rank_{place.rank:05d}.json"
        self._lock = threading.Lock()
        self._say()

    def run(self) -> None:
        """Pass all stages."""
        import torch
        import torch.distributed as dist

        watch = threading.Timer(self.patience, self._give_up)
        watch.daemon = True
        watch.start()
        self._enter("joining")
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", self.place.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        self.report.backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(self.report.backend, timeout=datetime.timedelta(seconds=_LATER * self.patience))
        self._enter("barrier")
        dist.barrier()
        self._enter("all_reduce")
        for dtype in (torch.float32, torch.float64):
            self._check(f"all_reduce {dtype}", _reduces_rightly(self.place, dtype, device))
        for name, dtype in (("bf16", torch.bfloat16), ("float64", torch.float64)):
            self._enter(f"all_to_all {name}")
            self._check(f"all_to_all_single {dtype}", _exchanges_rightly(self.place, dtype, device))
        self._enter("clocks")
        self.report.offset, self.report.uncertainty = _clock_offset(device)
        self._enter("bandwidth")
        self.report.num_bytes = _CUDA_BYTES if on_gpu else _CPU_BYTES
        self.report.seconds = _measure(self.report.num_bytes, self.place.world, device)
        self._enter("leaving")
        dist.destroy_process_group()
        watch.cancel()
        self._enter("done")

    def fail(self, error: Exception) -> None:
        """Say what was raised."""
        text = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        self.report.error = text if len(text) <= _ERROR_LENGTH else f"{text[:_ERROR_LENGTH]}..."
        self._say()

    def _enter(self, stage: str) -> None:
        self.report.stage = stage
        self._say()

    def _check(self, name: str, is_right: bool) -> None:
        if not is_right:
            self.report.wrong.append(name)

    def _give_up(self) -> None:
        self.report.waited = True
        self._say()
        # The agent ends all when one has ended: the others get the time to say that they waited too.
        time.sleep(lingering(self.patience))
        # The main thread is in native code, where nothing else reaches it.
        os._exit(1)

    def _say(self) -> None:
        """Replace the report whole, so that nobody reads half of one."""
        with self._lock:
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps(asdict(self.report)))
            beside.replace(self._path)


def lingering(patience: float) -> float:
    """Seconds that a rank stays which gave up waiting."""
    return min(_LINGER_SECONDS, patience)


def read_reports(directory: Path) -> list[Report]:
    """What ranks said so far, in their order."""
    reports = []
    for path in sorted(directory.glob("rank_*.json")):
        try:
            reports.append(Report(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            # Not yet on this host's side of a shared file system.
            continue
    return reports


def _reduces_rightly(place: RankPlace, dtype: "torch.dtype", device: "torch.device") -> bool:
    import torch
    import torch.distributed as dist

    numbers = torch.arange(1000, dtype=dtype, device=device) + place.rank
    dist.all_reduce(numbers)
    wanted = torch.arange(1000, dtype=dtype, device=device) * place.world + sum(range(place.world))
    return torch.equal(numbers, wanted)


def sent(sender: int, receiver: int) -> int:
    """Numbers that one rank sends another: an uneven exchange, as rows of tables make it, with empty parts."""
    return (sender + 2 * receiver) % 4 * 7


def _exchanges_rightly(place: RankPlace, dtype: "torch.dtype", device: "torch.device") -> bool:
    import torch
    import torch.distributed as dist

    def part(sender: int, receiver: int) -> "torch.Tensor":
        # Whole numbers that bf16 holds exactly, another one for every pair nearby.
        count = sent(sender, receiver)
        return (torch.arange(count) + 16 * sender + 64 * receiver).remainder(256).to(device, dtype)

    ranks = range(place.world)
    outgoing = torch.cat([part(place.rank, receiver) for receiver in ranks])
    incoming = outgoing.new_full((sum(sent(sender, place.rank) for sender in ranks),), -1)
    dist.all_to_all_single(
        incoming,
        outgoing,
        [sent(sender, place.rank) for sender in ranks],
        [sent(place.rank, receiver) for receiver in ranks],
    )
    return torch.equal(incoming, torch.cat([part(sender, place.rank) for sender in ranks]))


def _clock_offset(device: "torch.device") -> tuple[float, float]:
    """Seconds that this clock is ahead of rank 0's, from the round that took the least time, and that time."""
    import torch
    import torch.distributed as dist

    best = (0.0, float("inf"))
    for _ in range(_NUM_ROUNDS):
        began = time.monotonic()
        dist.barrier()
        times = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(dist.get_world_size())]
        own = torch.tensor([time.time()], dtype=torch.float64, device=device)
        dist.all_gather(times, own)
        offset, took = float(own) - float(times[0]), time.monotonic() - began
        best = min(best, (offset, took), key=lambda found: found[1])
    return best


def _measure(num_bytes: int, world: int, device: "torch.device") -> dict[str, float]:
    """Seconds of one collective of a size, the best of a few."""
    import torch
    import torch.distributed as dist

    numbers = torch.ones(num_bytes // 4 // world * world, dtype=torch.float32, device=device)
    other = torch.empty_like(numbers)
    return {
        "all_reduce": _best(lambda: dist.all_reduce(numbers), device),
        "all_to_all": _best(lambda: dist.all_to_all_single(other, numbers), device),
    }


def _best(collective: Callable[[], Any], device: "torch.device") -> float:
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(_NUM_ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> int:
    """Be a rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mempar.tools.doctor.smoke_rank")
    parser.add_argument("--reports", type=Path, required=True, help="directory for reports, shared by all ranks")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for other ranks, in all")
    parser.add_argument("--node", default="", help="name of this node; the host's own unless given")
    parser.add_argument("--launcher", type=int, default=0, help="process on this machine to die with")
    given = parser.parse_args()
    die_with(given.launcher)
    warnings.simplefilter("ignore")
    rank = Rank(rank_place(), given.reports, given.patience, given.node)
    try:
        rank.run()
    except Exception as error:
        rank.fail(error)
        # Groups with a dead member may take their time to be torn down.
        os._exit(1)
    return 0 if not rank.report.wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
