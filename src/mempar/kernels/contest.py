"""Contests: an operation and its rivals on the same inputs, right first, then timed in one run.

An operation's `bench.py` yields contests at a shape; benchmarks/kernels.py runs those of all operations and prints one
table. Times are of single calls, one side after the other in turns, so that what else a shared machine does falls on
all alike. On CUDA they are taken by events on the stream, with the level-2 cache emptied before each call, as a
training step would leave it. The roofline is measured in the same run: bytes by a copy, FLOPs by a matmul.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Seconds for all sides of one contest together, and the calls of a side at least and at most.
_SECONDS = 2.0
_FEWEST, _MOST = 5, 100
# Numbers that are compared at a time.
_COMPARED = 1 << 24
# More than the level-2 cache of any GPU so far (126 MB, B200).
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a lookup; letters as in dims.py.

    Attributes:
        name: the model that has them.
        tokens: T, of a micro-batch on one rank.
        width: C and D.
        heads: H.
        top_k: K.
        subkeys: N.
        half_key: Q.
        dtype: of the table and of activations.
    """

    name: str
    tokens: int
    width: int
    heads: int = 4
    top_k: int = 32
    subkeys: int = 1024
    half_key: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def reads(self) -> int:
        """M, rows read by a token."""
        return self.heads * self.top_k

    @property
    def value_bytes(self) -> int:
        """Bytes of a number of the table."""
        return self.dtype.itemsize

    def rows_within(self, num_bytes: int) -> int:
        """Rows of the table, all N * N or as many as fit in so many bytes."""
        return min(self.subkeys**2, num_bytes // (self.width * self.value_bytes))


# Tokens of a micro-batch; widths, sub-keys and keys of the models of "Memory Layers at Scale" (arXiv 2412.09764).
SHAPES = {
    "134m": Shape(name="134m", tokens=16384, width=768, half_key=192),
    "1.3b": Shape(name="1.3b", tokens=16384, width=2048, half_key=512),
    "8b": Shape(name="8b", tokens=16384, width=4096, subkeys=4096, half_key=256),
    # What a machine without a GPU can be asked.
    "cpu": Shape(name="cpu", tokens=2048, width=256, half_key=64, dtype=torch.float32),
}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """An operation on some inputs, and others that compute the same.

    Attributes:
        name: of the operation.
        ours: computes it.
        truth: computes it in some plain way, for `ours` to be compared with; None where it was compared before.
        sample: what is compared where `ours` changes its inputs: the same on a few of them; by default `ours`.
        rivals: other ways by name, the first of them the one that ratios are given to.
        num_bytes: that must be read and written, at least.
        num_flops: that must be computed, at least.
        tolerance: of the largest difference from `truth`, relative to the largest number.
        inputs: what another implementation would be called with, by name.
    """

    name: str
    ours: Callable[[], object]
    truth: Callable[[], object] | None = None
    sample: Callable[[], object] | None = None
    rivals: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    num_bytes: int = 0
    num_flops: int = 0
    tolerance: float = 0.0
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a device reaches at best, measured.

    Attributes:
        bytes_per_s: read and written by a copy.
        flops_per_s: of a matmul.
    """

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, contest: Contest) -> float:
        """Least time that a contest's bytes and FLOPs take, whichever is longer."""
        return max(contest.num_bytes / self.bytes_per_s, contest.num_flops / self.flops_per_s)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of single calls, ascending."""

    seconds: list[float]

    def quantile(self, share: float) -> float:
        """Seconds that a share of the calls stayed within."""
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]

    @property
    def median(self) -> float:
        """Seconds of the middle call."""
        return statistics.median(self.seconds)


def time_in_turns(sides: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Times]:
    """Time single calls of several functions, taking turns."""
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    once = {name: max(clock(function), clock(function)) for name, function in sides.items()}
    rounds = int(min(_MOST, max(_FEWEST, _SECONDS / max(1e-9, sum(once.values())))))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            seconds[name].append(clock(function))
    return {name: Times(seconds=sorted(of_side)) for name, of_side in seconds.items()}


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure what a copy and a matmul reach."""
    num_bytes, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(size, size, device=device).to(dtype)
    times = time_in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: matrix @ matrix}, device)
    return Roofline(
        bytes_per_s=2 * num_bytes / times["copy"].quantile(0.2), flops_per_s=2 * size**3 / times["matmul"].quantile(0.2)
    )


def largest_error(contest: Contest) -> float | None:
    """Largest difference between `ours` and `truth`, relative to each tensor's largest number; None without truth."""
    if contest.truth is None:
        return None
    ours, truth = _tensors((contest.sample or contest.ours)()), _tensors(contest.truth())
    assert [t.shape for t in ours] == [t.shape for t in truth], f"{contest.name}: shapes differ"
    return max((_largest_difference(one, other) for one, other in zip(ours, truth, strict=True)), default=0.0)


def _largest_difference(ours: Tensor, truth: Tensor) -> float:
    """Relative to the largest number; without copies of the whole in float64."""
    pairs = zip(ours.reshape(-1).split(_COMPARED), truth.reshape(-1).split(_COMPARED), strict=True)
    found = [
        (float((one.double() - other.double()).abs().max()), float(other.abs().max()))
        for one, other in pairs
        if one.numel()
    ]
    # Not Python's max(), which may pass over what is not a number.
    difference, largest = torch.tensor([(0.0, 1e-30), *found], dtype=torch.float64).amax(0).tolist()
    return difference / largest


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    assert isinstance(result, Iterable)
    return [each.detach() for each in result if isinstance(each, Tensor)]


def _cpu_clock(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)

    def clock(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock
