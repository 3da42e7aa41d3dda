"""What this machine computes on: GPUs as torch sees them, its driver, cores."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mempar.runtime.hardware import GPUS, Gpu

_PROBE = "mempar.tools.doctor.device_probe"
# A healthy driver answers in seconds; without persistence mode eight GPUs take half a minute.
_PROBE_SECONDS = 120.0
_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU.

    Attributes:
        name: as its driver gives it.
        total_bytes: of its memory.
        free_bytes: of these.
        capability: of its architecture, e.g. (9, 0).
        problem: why it cannot be used; empty if it can.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (9, 0)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine computes on.

    Attributes:
        cuda: CUDA version that torch was built for; empty for a CPU build.
        driver: version of NVIDIA's driver; empty if there is none.
        models: GPUs that the driver knows.
        devices: those that torch can use.
        problem: why torch can use none.
        num_cores: cores that this process may use.
    """

    cuda: str
    driver: str = ""
    models: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    problem: str = ""
    num_cores: int = 1


def is_kind(name: str, gpu: Gpu) -> bool:
    """Whether a device's name is that of a kind of GPU: `NVIDIA A100-SXM4-80GB` is an A100, a GH200 is no H200."""
    return re.search(rf"\b{re.escape(gpu.label)}\b", name) is not None


def link_gb_per_s(devices: Sequence[str]) -> float | None:
    """NVLink's bandwidth between GPUs of one machine, by their names; None for what has no figures or is no NVLink."""
    name = devices[0] if devices else "PCIe"
    return next((gpu.link_gb_per_s for gpu in GPUS.values() if "PCIe" not in name and is_kind(name, gpu)), None)


def collect(cuda: str) -> Machine:
    """Look at this machine; without a CUDA build of torch no device is asked."""
    devices, problem = _probe() if cuda else ((), "")
    return Machine(
        cuda=cuda,
        driver=_driver_version(),
        models=_models(),
        devices=devices,
        problem=problem,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _probe() -> tuple[tuple[Device, ...], str]:
    """Devices that torch can use, or why it can use none."""
    try:
        found = subprocess.run(
            [sys.executable, "-m", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return (), f"the driver did not answer within {_PROBE_SECONDS:g} s"
    try:
        said = json.loads(found.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return (), found.stderr.strip().rpartition("\n")[2] or f"looking at it ended with status {found.returncode}"
    devices = [Device(**{**device, "capability": tuple(device["capability"])}) for device in said["devices"]]
    return tuple(devices), said["problem"]


def _driver_version() -> str:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", (_DRIVER / "version").read_text())
    except OSError:
        return ""
    return found.group(1) if found else "unknown"


def _models() -> tuple[str, ...]:
    models = []
    for path in sorted(_DRIVER.glob("gpus/*/information")):
        try:
            found = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        models.append(found.group(1).strip() if found else "a GPU")
    return tuple(models)
