"""What recipes are laid out for: the section `hardware`, and what is known of GPUs."""

import dataclasses

import pytest

from config_samples import BASE
from mempar.errors import ConfigError
from mempar.runtime.hardware import GPUS, HardwareConfig
from mempar.runtime.overrides import override


def test_figures_of_gpus_are_in_their_units() -> None:
    for name, gpu in GPUS.items():
        assert gpu.label == name.upper()
        assert 60e9 < gpu.memory_bytes < 400e9
        assert 100 < gpu.bf16_tflops < 10_000
        # Memory is the fastest, the network the slowest.
        assert gpu.memory_gb_per_s > gpu.link_gb_per_s > gpu.network_gb_per_s > 1
        assert gpu.source.startswith("NVIDIA")
        # What is reached of the peaks is somebody's figure, or said to be assumed.
        assert gpu.gpu == name and gpu.shares_source and "gather_share" in gpu.assumed
        assert 0 < gpu.link_latency_us < gpu.network_latency_us < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matmul_share": 1.5}, "matmul_share=1.5 must be a positive number of at most 1"),
        ({"gather_share": 0.0}, "gather_share=0.0 must be a positive number"),
        ({"memory_gb_per_s": float("nan")}, "memory_gb_per_s=nan must be a positive number"),
        ({"kernel_us": -1.0}, "kernel_us=-1.0 must be at least 0"),
        ({"gpu": "h300"}, "gpu=h300 is not known; it is one of a100, h100, h200, b200"),
    ],
)
def test_figures_that_are_none_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GPUS["h200"], **change)


def test_a_run_is_meant_for_the_gpus_that_it_names() -> None:
    run = dataclasses.replace(BASE, hardware=HardwareConfig(gpu="h200", gpus=64))
    assert run.num_gpus == 64
    assert run.hardware.kind is GPUS["h200"]
    assert BASE.hardware.kind is None
    assert BASE.with_parallel(tp=2, mp=3).num_gpus == 6


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("hardware.gpu=h300", "is one of a100, h100, h200, b200"),
        ("hardware.gpus=8", "GPUs are of some kind"),
        ("hardware.gpus=-1", "must be at least 0"),
    ],
)
def test_unknown_hardware_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(BASE, [assignment])
