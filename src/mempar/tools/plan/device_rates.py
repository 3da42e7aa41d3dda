"""What the device at hand does: matrix products, attention, copies and reads of rows, measured.

Each figure is the median of a few calls after one that warms up; a minute at the most all together, a few seconds on a
GPU. Rows are read by the operation that lookups use, on the backend that training would choose. Imports torch: only
`mempar plan --measure` asks.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mempar.kernels.dispatch import choose_backend
from mempar.kernels.weighted_gather import weighted_gather

_CALLS, _SECONDS = 5, 2.0
# Widths of rows that are read, in numbers of 4 bytes, and rows of a token.
_NARROW, _WIDE, _READS = 64, 1024, 32


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Measured figures.

    Attributes:
        bf16_tflops: square products.
        float32_tflops: likewise.
        model_tflops: products in the shapes of a language model, in the width that is faster.
        attention_tflops: fused causal attention, forward, likewise.
        memory_gb_per_s: a copy, bytes read and written.
        row_gb_per_s: reads of wide rows in no order.
        row_overhead_bytes: what a read costs beside its row, as bytes at that rate.
        kernel_us: an operation on one number.
    """

    bf16_tflops: float
    float32_tflops: float
    model_tflops: float
    attention_tflops: float
    memory_gb_per_s: float
    row_gb_per_s: float
    row_overhead_bytes: int
    kernel_us: float


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is measured on: large on a GPU, what a core does in a fraction of a second elsewhere."""

    square: int
    tokens: int
    width: int
    ffn: int
    length: int
    copy_bytes: int
    table_bytes: int
    reads: int


_GPU = _Sizes(
    square=8192, tokens=8192, width=4096, ffn=14336, length=8192, copy_bytes=1 << 30, table_bytes=1 << 30,
    reads=1 << 20,
)  # fmt: skip
_CPU = _Sizes(
    square=768, tokens=512, width=512, ffn=1536, length=512, copy_bytes=1 << 27, table_bytes=1 << 27, reads=1 << 15
)


def measure_device(device: torch.device) -> DeviceRates:
    """Measure one device, on one thread where it is a CPU: a rank has one."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _measure(device, _GPU if device.type == "cuda" else _CPU)
    finally:
        torch.set_num_threads(threads)


def _measure(device: torch.device, sizes: _Sizes) -> DeviceRates:
    squares = {dtype: _square_tflops(device, sizes, dtype) for dtype in (torch.bfloat16, torch.float32)}
    dtype = max(squares, key=lambda each: squares[each])
    slope_us, overhead_bytes = _rows(device, sizes)
    number = torch.zeros(1, device=device)
    many = 1000
    return DeviceRates(
        bf16_tflops=squares[torch.bfloat16],
        float32_tflops=squares[torch.float32],
        model_tflops=_model_tflops(device, sizes, dtype),
        attention_tflops=_attention_tflops(device, sizes, dtype),
        memory_gb_per_s=_copy_gb_per_s(device, sizes),
        row_gb_per_s=1e-3 / slope_us,
        row_overhead_bytes=overhead_bytes,
        kernel_us=_seconds(lambda: [number.add_(1) for _ in range(many)], device) / many * 1e6,
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call."""
    call()
    times, until = [], time.perf_counter() + _SECONDS
    while len(times) < _CALLS and (not times or time.perf_counter() < until):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _square_tflops(device: torch.device, sizes: _Sizes, dtype: torch.dtype) -> float:
    left, right = (torch.randn(sizes.square, sizes.square, device=device).to(dtype) for _ in range(2))
    return 2 * sizes.square**3 / _seconds(lambda: left @ right, device) / 1e12


def _model_tflops(device: torch.device, sizes: _Sizes, dtype: torch.dtype) -> float:
    """Projections of attention and both products of a feed-forward network, one after the other."""
    shapes = ((sizes.width, 3 * sizes.width), (sizes.width, 2 * sizes.ffn), (sizes.ffn, sizes.width))
    pairs = [
        (
            torch.randn(sizes.tokens, inner, device=device).to(dtype),
            torch.randn(inner, columns, device=device).to(dtype),
        )
        for inner, columns in shapes
    ]
    flops = sum(2 * sizes.tokens * inner * columns for inner, columns in shapes)
    return flops / _seconds(lambda: [left @ right for left, right in pairs], device) / 1e12


def _attention_tflops(device: torch.device, sizes: _Sizes, dtype: torch.dtype) -> float:
    head = 128 if device.type == "cuda" else 64
    heads = sizes.width // head
    query = torch.randn(1, heads, sizes.length, head, device=device).to(dtype)
    # Causal: half of all pairs, two products.
    flops = 2 * heads * sizes.length**2 * head
    return flops / _seconds(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True), device) / 1e12


def _copy_gb_per_s(device: torch.device, sizes: _Sizes) -> float:
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copy_bytes / _seconds(lambda: target.copy_(source), device) / 1e9


def _rows(device: torch.device, sizes: _Sizes) -> tuple[float, int]:
    """Microseconds of a byte of a row, and bytes that a read costs besides: the line through two widths."""
    times = {}
    backend = choose_backend("auto", device.type)
    offsets = torch.arange(0, sizes.reads + 1, _READS, dtype=torch.int32, device=device)
    weight = torch.ones(sizes.reads, device=device)
    for columns in (_NARROW, _WIDE):
        table = torch.zeros(sizes.table_bytes // (4 * columns), columns, device=device)
        rows = torch.randint(len(table), (sizes.reads,), dtype=torch.int32, device=device)

        def read(table: torch.Tensor = table, rows: torch.Tensor = rows) -> torch.Tensor:
            return weighted_gather(table, rows, weight, offsets, backend=backend)

        times[4 * columns] = _seconds(read, device) / sizes.reads * 1e6
    narrow, wide = times
    # Wide rows take longer, whatever a busy machine says.
    slope_us = max(times[wide] - times[narrow], 0.1 * times[wide]) / (wide - narrow)
    return slope_us, max(0, round(times[narrow] / slope_us - narrow))
