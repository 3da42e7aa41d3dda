"""`mempar plan --measure`: a hardware description of this machine, as far as it can be measured on one machine.

Peaks of a GPU that is known are its maker's, and shares are measured against them; elsewhere the best measured is the
peak. What cannot be measured here (the network to other nodes, links of a machine with one GPU) is said in `assumed`.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from mempar.errors import MemparError
from mempar.parallel.links import Link
from mempar.runtime.hardware import GPUS, Gpu, Hardware
from mempar.tools.plan.link_rank import FOUND

_WORKER = "mempar.tools.plan.link_rank"
# What ranks get to import torch from a cold disk, and to measure.
_PATIENCE_SECONDS = 120.0
# Of a device that nobody describes, by its compute capability: whose engine and reserved memory are assumed.
_KINDS = {8: "a100", 9: "h100", 10: "b200"}


def measure(say: Callable[[str], None]) -> Hardware:
    """Measure this machine.

    Args:
        say: told what is measured.

    Raises:
        MemparError: when ranks on this machine cannot reach each other.
    """
    import torch

    from mempar.tools.plan.device_rates import DeviceRates, measure_device

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    num_devices = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    say("measuring matrix products, attention, copies and reads of rows")
    rates: DeviceRates = measure_device(device)
    link = None
    if num_devices > 1 or not on_gpu:
        say(f"measuring the link between two {'GPUs' if on_gpu else 'processes'} of this machine")
        link = measure_link()
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        name, num_bytes = properties.name, properties.total_memory
        known = next((kind for kind, each in GPUS.items() if _is_labelled(name, each)), None)
        gpu = known or _KINDS.get(properties.major, "a100")
        base = GPUS[known] if known else None
    else:
        name, num_bytes = f"CPU, {_processor()}", psutil.virtual_memory().total // num_devices
        gpu, base = "", None
    peak = max(rates.bf16_tflops, rates.float32_tflops)
    memory = rates.memory_gb_per_s
    made = _unknown(name, gpu, num_bytes, num_devices, rates.bf16_tflops, rates.float32_tflops, memory)
    if base is not None:
        peak, memory = base.bf16_tflops, base.memory_gb_per_s
        made = replace(base, memory_bytes=num_bytes, gpus_per_node=num_devices)
    measured = replace(
        made,
        matmul_share=_share(rates.model_tflops, peak),
        attention_share=_share(rates.attention_tflops, peak),
        memory_share=_share(rates.memory_gb_per_s, memory),
        gather_share=_share(rates.row_gb_per_s, memory),
        row_overhead_bytes=rates.row_overhead_bytes,
        kernel_us=round(rates.kernel_us, 3),
        shares_source=f"measured on {datetime.date.today().isoformat()}, {name}, torch {torch.__version__}",
    )
    return _with_link(measured, link, known=base is not None)


def measure_link() -> Link:
    """Measure the link between two ranks on this machine.

    Raises:
        MemparError: when they do not reach each other, or take too long.
    """
    with tempfile.TemporaryDirectory(prefix="mempar-plan-") as directory:
        command = [sys.executable, "-m", _WORKER]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), "2", directory], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        until = time.monotonic() + _PATIENCE_SECONDS
        try:
            said = [rank.communicate(timeout=max(0.1, until - time.monotonic()))[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            said = [f"they took more than {_PATIENCE_SECONDS:.0f} s"]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.communicate()
        found = Path(directory, FOUND)
        if not found.exists():
            lines = [line for text in said for line in text.splitlines() if line.strip()]
            raise MemparError(
                f"two ranks on this machine could not measure their link ({lines[-1] if lines else 'no word of why'}); "
                "ranks must reach each other; `mempar doctor` says what stands in the way."
            )
        return Link(**json.loads(found.read_text()))


def _is_labelled(name: str, gpu: Gpu) -> bool:
    """Whether a device's name has a kind's as a word of its own: a GH200 is no H200."""
    return re.search(rf"\b{re.escape(gpu.label)}\b", name) is not None


def _unknown(
    name: str, gpu: str, num_bytes: int, num_devices: int, bf16_tflops: float, float32_tflops: float, memory: float
) -> Hardware:
    """A description of a device that nobody describes: peaks are what was measured."""
    return replace(
        GPUS[gpu or "a100"],
        gpu=gpu,
        label=name,
        memory_bytes=num_bytes,
        gpus_per_node=num_devices,
        bf16_tflops=bf16_tflops,
        float32_tflops=float32_tflops,
        memory_gb_per_s=memory,
        source="measured: the fastest square product of each width, and a copy",
    )


def _with_link(hardware: Hardware, link: Link | None, *, known: bool) -> Hardware:
    """The description with the measured link; what it was not measured for is said."""
    if link is None:
        return replace(hardware, assumed="link_*, network_*: as data sheets have them; one GPU has no link to measure")
    rate, latency = round(link.gb_per_s, 3), round(link.latency_us, 3)
    if known:
        inside = {"link_share": _share(rate, hardware.link_gb_per_s), "link_latency_us": latency}
        return replace(hardware, **inside, assumed="network_*: as data sheets have them; nothing leaves this machine")
    return replace(
        hardware,
        link_gb_per_s=rate,
        link_share=1.0,
        link_latency_us=latency,
        network_gb_per_s=rate,
        network_share=1.0,
        network_latency_us=latency,
        assumed="network_*: as inside this machine; nothing leaves it",
    )


def _share(reached: float, peak: float) -> float:
    return round(min(1.0, max(1e-4, reached / peak)), 4)


def _processor() -> str:
    """Name of the processor, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
