"""What a run is meant for: GPUs, how many, and what one of them can do; data alone.

Figures are those of one GPU as its maker states them, without sparsity; bandwidths in one direction. A run with no
`hardware.gpu` is for a CPU, whose figures nobody states.
"""

from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.runtime.sections import at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node of eight.

    Attributes:
        label: its name in `torch.cuda.get_device_name()`.
        memory_bytes: what the driver shows.
        bf16_tflops: dense matrix products.
        memory_gb_per_s: bandwidth of its own memory.
        link_gb_per_s: to the other GPUs of its node, over NVLink.
        network_gb_per_s: to other nodes, its share of the adapters.
        gpus_per_node: of the maker's own servers.
        source: where the figures are from.
    """

    label: str
    memory_bytes: int
    bf16_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    gpus_per_node: int
    source: str


_MIB = 1 << 20
GPUS = {
    "a100": Gpu(
        label="A100",
        memory_bytes=81920 * _MIB,
        bf16_tflops=312.0,
        memory_gb_per_s=2039.0,
        link_gb_per_s=300.0,
        network_gb_per_s=25.0,
        gpus_per_node=8,
        source="NVIDIA A100 80GB SXM data sheet (2022); DGX A100, eight 200 Gb/s adapters; nvidia-smi",
    ),
    "h100": Gpu(
        label="H100",
        memory_bytes=81559 * _MIB,
        bf16_tflops=989.0,
        memory_gb_per_s=3350.0,
        link_gb_per_s=450.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA H100 SXM data sheet (2023); DGX H100, eight 400 Gb/s adapters; nvidia-smi",
    ),
    "h200": Gpu(
        label="H200",
        memory_bytes=143771 * _MIB,
        bf16_tflops=989.0,
        memory_gb_per_s=4800.0,
        link_gb_per_s=450.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA H200 SXM data sheet (2023); DGX H200, eight 400 Gb/s adapters; nvidia-smi",
    ),
    "b200": Gpu(
        label="B200",
        memory_bytes=183359 * _MIB,
        bf16_tflops=2250.0,
        memory_gb_per_s=8000.0,
        link_gb_per_s=900.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA DGX B200 data sheet (2024), eight 400 Gb/s adapters; nvidia-smi",
    ),
}


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What a recipe is laid out for: launched elsewhere, it may not fit.

    Attributes:
        gpu: one of `a100`, `h100`, `h200` and `b200`; empty for a CPU.
        gpus: how many; 0 for the fewest ranks that the layout can run on.
    """

    gpu: str = ""
    gpus: int = 0

    def __post_init__(self) -> None:
        """Check the name and the number."""
        at_least("hardware", self, 0, "gpus")
        if self.gpu and self.gpu not in GPUS:
            one_of("hardware", self, "gpu", tuple(GPUS))
        if self.gpus and not self.gpu:
            raise ConfigError(
                f"hardware.gpus={self.gpus} with no hardware.gpu: GPUs are of some kind; set hardware.gpu to one of "
                f"{', '.join(GPUS)}."
            )

    @property
    def kind(self) -> Gpu | None:
        """What is known of the GPU; None for a CPU."""
        return GPUS[self.gpu] if self.gpu else None
