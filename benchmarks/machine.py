"""What a result was measured on."""

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def describe_machine() -> dict[str, str]:
    """Hardware, versions, commit and date of a result."""
    described = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _said_by("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": f"{gpu.name}, {gpu.total_memory >> 30} GiB",
            "cuda": str(torch.version.cuda),
            "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "triton": metadata.version("triton"),
        }
    return described


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "unknown"
