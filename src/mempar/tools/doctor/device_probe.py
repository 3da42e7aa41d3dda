"""Looks at CUDA devices, as a process of its own: `python -m mempar.tools.doctor.device_probe` prints one JSON object.

A driver that crashes or hangs takes this process alone with it, and no context of doctor's stays on the devices while
ranks are tried out.
"""

import json
import warnings
from typing import Any

from mempar.runtime.launch.parent import die_with


def probe() -> dict[str, Any]:
    """Return `problem`, why CUDA cannot be used (empty if it can), and `devices`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import torch

        available = torch.cuda.is_available()
    if not available:
        return {"problem": "; ".join(str(one.message) for one in said) or "torch finds no CUDA device", "devices": []}
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        device = {"name": about.name, "total_bytes": about.total_memory, "capability": [about.major, about.minor]}
        try:
            free, _ = torch.cuda.mem_get_info(index)
            devices.append({**device, "free_bytes": free, "problem": ""})
        except RuntimeError as error:
            devices.append({**device, "free_bytes": 0, "problem": str(error).partition("\n")[0]})
    return {"problem": "", "devices": devices}


if __name__ == "__main__":
    die_with(0)
    print(json.dumps(probe()))
