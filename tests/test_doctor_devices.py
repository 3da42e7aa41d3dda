"""Doctor on GPUs and cores (mempar.tools.doctor devices, machine, device_probe)."""

from dataclasses import replace

import pytest

from mempar.runtime.hardware import GPUS
from mempar.tools.doctor import devices, machine
from mempar.tools.doctor.device_probe import probe
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.machine import Device, Machine, is_kind

H200 = GPUS["h200"]
ONE = Device(name="NVIDIA H200", total_bytes=150_110_000_000, free_bytes=149_500_000_000)
NODE = Machine(cuda="13.0", driver="580.65", models=("NVIDIA H200",) * 8, devices=(ONE,) * 8, num_cores=96)
CPU = Machine(cuda="", num_cores=4)


def look(
    there: Machine, wanted: str = "h200", num_wanted: int = 8, num_ranks: int = 8, **others: bool
) -> list[Finding]:
    gpu = GPUS[wanted] if wanted else None
    asked = {"has_scheduler": False, **others}
    found = devices.check(there, wanted=gpu, num_wanted=num_wanted, num_ranks=num_ranks, **asked)
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return found


def worst_of(found: list[Finding], check: str) -> Finding:
    return next(one for one in found if one.check == f"devices.{check}")


def test_what_the_recipe_wants_is_ok() -> None:
    found = look(NODE)
    assert {one.level for one in found} == {"ok"} and "8 x NVIDIA H200" in found[0].what
    assert {one.level for one in look(CPU, "", num_ranks=4)} == {"ok"}


def test_too_few_gpus_and_those_of_another_kind() -> None:
    found = worst_of(look(replace(NODE, devices=(ONE,) * 4), num_ranks=4), "kind")
    assert found.level == "error" and "4 x NVIDIA H200; the recipe wants 8" in found.what
    smaller = replace(ONE, name="NVIDIA H100 80GB HBM3", total_bytes=85_000_000_000)
    assert worst_of(look(replace(NODE, devices=(smaller,) * 8)), "kind").level == "error"
    larger = replace(ONE, name="NVIDIA B200", total_bytes=190_000_000_000)
    found = worst_of(look(replace(NODE, devices=(larger,) * 8)), "kind")
    assert found.level == "warning" and "hardware.gpu" in found.remedy
    assert worst_of(look(replace(NODE, devices=(ONE,) * 7 + (larger,))), "kind").level == "warning"
    # Of the same name, with half the memory.
    half = replace(ONE, name="NVIDIA A100-SXM4-40GB", total_bytes=42_300_000_000)
    assert worst_of(look(replace(NODE, devices=(half,) * 8), "a100"), "kind").level == "error"


def test_names_of_gpus() -> None:
    assert is_kind("NVIDIA A100-SXM4-80GB", GPUS["a100"]) and is_kind("NVIDIA H100 80GB HBM3", GPUS["h100"])
    assert not is_kind("NVIDIA GH200 480GB", H200) and not is_kind("NVIDIA H100", H200)


def test_gpus_that_are_broken_taken_or_old_are_numbered() -> None:
    broken = replace(ONE, problem="CUDA error: uncorrectable ECC error encountered")
    taken = replace(ONE, free_bytes=100_000_000_000)
    old = replace(ONE, capability=(7, 0))
    found = look(replace(NODE, devices=(ONE, broken, taken, ONE, taken, old, ONE, ONE)))
    assert worst_of(found, "broken").level == "error" and worst_of(found, "broken").values == {"gpus": [1]}
    memory = worst_of(found, "memory")
    assert memory.level == "warning" and "GPU 2, 4: 46.7 GiB of 139.8 GiB are taken" in memory.what
    assert worst_of(found, "capability").level == "warning" and "7.0" in worst_of(found, "capability").what


def test_more_ranks_than_gpus_or_cores() -> None:
    assert worst_of(look(NODE, num_ranks=9), "ranks").level == "error"
    found = worst_of(look(CPU, "", num_ranks=6), "cores")
    assert (found.level, found.what) == ("warning", "4 cores for 6 ranks")


def test_gpus_that_torch_cannot_use() -> None:
    without_cuda = replace(CPU, driver="580.65", models=("NVIDIA H200",))
    assert worst_of(look(without_cuda), "cuda").level == "error"
    assert worst_of(look(without_cuda, ""), "cuda").level == "warning"
    old_driver = replace(without_cuda, cuda="13.0", problem="The NVIDIA driver on your system is too old")
    found = worst_of(look(old_driver, ""), "cuda")
    assert found.level == "error" and "too old" in found.what and "nvidia-smi" in found.remedy
    assert worst_of(look(replace(CPU, cuda="13.0", problem="no device"), ""), "cuda").level == "ok"


def test_a_login_node_is_thought_of() -> None:
    found = worst_of(look(CPU, has_scheduler=True), "cuda")
    assert found.level == "error" and "srun" in found.remedy
    assert "srun" not in worst_of(look(CPU), "cuda").remedy


def test_this_machine_is_looked_at() -> None:
    there = machine.collect(cuda="")
    assert there.num_cores >= 1 and there.devices == ()


def test_a_probe_without_devices_says_why() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there are devices")
    assert probe() == {"problem": "torch finds no CUDA device", "devices": []}
