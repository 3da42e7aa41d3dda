"""What a run is meant for: GPUs, how many, what one of them can do at best, and what of that is reached; data alone.

Peaks are those of one GPU as its maker states them, without sparsity; bandwidths in one direction. Nothing of mempar
has been measured on a GPU: shares of the peaks are what others measured, with source and date, or assumptions that
`assumed` names. `mempar plan --measure` fills in a description for the machine at hand (see hardware_file.py). A run
with no `hardware.gpu` is for a CPU, whose figures nobody states.
"""

from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.parallel.links import Link, Topology
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


@dataclass(frozen=True, kw_only=True)
class Hardware(Gpu):
    """A machine's device as the planner sees it: peaks, the shares of them that are reached, and latencies.

    Attributes:
        gpu: the kind that runs are told they are for (`hardware.gpu`); empty for a CPU.
        float32_tflops: matrix products of float32 operands; float64's are taken to be half as fast.
        matmul_share: of the peak of matrix products, in those of a language model.
        attention_share: of the same peak, in fused attention.
        memory_share: of the memory's bandwidth, in long copies.
        gather_share: of the memory's bandwidth, in reads of whole rows in no order.
        row_overhead_bytes: what one such read costs beside its row, as if so many more bytes were read.
        link_share: of a link's bandwidth inside a node, in collectives of large messages.
        network_share: of the network's, likewise.
        link_latency_us: of one message inside a node.
        network_latency_us: of one message between nodes.
        kernel_us: of any operation, however small.
        shares_source: where shares and latencies are from.
        assumed: those of them that nobody measured, and why these numbers were taken.
    """

    gpu: str
    float32_tflops: float
    matmul_share: float
    attention_share: float
    memory_share: float
    gather_share: float
    row_overhead_bytes: int
    link_share: float
    network_share: float
    link_latency_us: float
    network_latency_us: float
    kernel_us: float
    shares_source: str
    assumed: str

    def __post_init__(self) -> None:
        """Refuse figures that are none."""
        at_least("hardware", self, 1, "memory_bytes", "gpus_per_node")
        positive = ("bf16_tflops", "float32_tflops", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s")
        shares = ("matmul_share", "attention_share", "memory_share", "gather_share", "link_share", "network_share")
        for name in (*positive, *shares):
            value, limit = getattr(self, name), 1.0 if name in shares else float("inf")
            if not 0 < value <= limit:
                most = " of at most 1" if name in shares else ""
                raise ConfigError(f"hardware {name}={value} must be a positive number{most}; correct {name}.")
        at_least("hardware", self, 0, "row_overhead_bytes", "link_latency_us", "network_latency_us", "kernel_us")
        if self.gpu and self.gpu not in _KINDS:
            one_of("hardware", self, "gpu", _KINDS)

    @property
    def topology(self) -> Topology:
        """The links of as many of these devices as one likes, at what is reached of their bandwidths."""
        across = self.network_gb_per_s * self.network_share
        return Topology(
            inside=Link(latency_us=self.link_latency_us, gb_per_s=self.link_gb_per_s * self.link_share),
            across=Link(latency_us=self.network_latency_us, gb_per_s=across),
            ranks_per_node=self.gpus_per_node,
            node_gb_per_s=across * self.gpus_per_node,
        )


_MIB = 1 << 20
_KINDS = ("a100", "h100", "h200", "b200")
# Shares and latencies that all kinds have in common.
_COPY = "copies: 4.3 of 4.8 TB/s on an H200 (2026)"
_LATENCY = "latencies: NCCL's own model, tuning.h, one step of a ring with the protocol Simple (2.18, 2023)"
_NETWORK = "network: 46 to 48 of 50 GB/s an adapter, github.com/NVIDIA/nccl-tests issues 267 and 290 (2024, 2025)"
_ASSUMED = (
    "gather_share and row_overhead_bytes: rows are read in whole sectors, and rows of under 512 bytes read badly; "
    "attention_share: between FlashAttention-2 (35%) and 3 (75%) on an H100, arXiv 2407.08608; kernel_us: gaps between "
    "kernels of a stream that is ahead of the device"
)
_A100_SHARES = (
    "matrix products: 268 of 312 TFLOP/s at the best shape, github.com/stas00/ml-engineering (2024); NVLink: 208 to "
    "230 of 300 GB/s, github.com/NVIDIA/nccl-tests issues 149 and 178 (2023)"
)
_HOPPER_SHARES = (
    "matrix products: 720 of 989 TFLOP/s in shapes of language models (SemiAnalysis, 2024-12); NVLink: 370 of 450 "
    "GB/s, github.com/NVIDIA/nccl-tests issue 212 (2024-05)"
)
_B200_SHARES = "matrix products: 1448 to 1562 of 2250 TFLOP/s in feed-forward networks, arXiv 2604.23466 (2026)"
GPUS = {
    "a100": Hardware(
        gpu="a100",
        label="A100",
        memory_bytes=81920 * _MIB,
        bf16_tflops=312.0,
        float32_tflops=19.5,
        memory_gb_per_s=2039.0,
        link_gb_per_s=300.0,
        network_gb_per_s=25.0,
        gpus_per_node=8,
        source="NVIDIA A100 80GB SXM data sheet (2022); DGX A100, eight 200 Gb/s adapters; nvidia-smi",
        matmul_share=0.78,
        attention_share=0.55,
        memory_share=0.9,
        gather_share=0.8,
        row_overhead_bytes=64,
        link_share=0.75,
        network_share=0.94,
        link_latency_us=3.4,
        network_latency_us=14.0,
        kernel_us=2.0,
        shares_source=f"{_A100_SHARES}; {_NETWORK}; {_COPY}; {_LATENCY}",
        assumed=f"matmul_share: the best shape's .86, less what language models' shapes lose on an H100; {_ASSUMED}",
    ),
    "h100": Hardware(
        gpu="h100",
        label="H100",
        memory_bytes=81559 * _MIB,
        bf16_tflops=989.0,
        float32_tflops=67.0,
        memory_gb_per_s=3350.0,
        link_gb_per_s=450.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA H100 SXM data sheet (2023); DGX H100, eight 400 Gb/s adapters; nvidia-smi",
        matmul_share=0.73,
        attention_share=0.5,
        memory_share=0.9,
        gather_share=0.8,
        row_overhead_bytes=64,
        link_share=0.82,
        network_share=0.94,
        link_latency_us=3.4,
        network_latency_us=14.0,
        kernel_us=2.0,
        shares_source=f"{_HOPPER_SHARES}; {_NETWORK}; {_COPY}; {_LATENCY}",
        assumed=f"memory_share: as on an H200; {_ASSUMED}",
    ),
    "h200": Hardware(
        gpu="h200",
        label="H200",
        memory_bytes=143771 * _MIB,
        bf16_tflops=989.0,
        float32_tflops=67.0,
        memory_gb_per_s=4800.0,
        link_gb_per_s=450.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA H200 SXM data sheet (2023); DGX H200, eight 400 Gb/s adapters; nvidia-smi",
        matmul_share=0.73,
        attention_share=0.5,
        memory_share=0.9,
        gather_share=0.8,
        row_overhead_bytes=64,
        link_share=0.82,
        network_share=0.94,
        link_latency_us=3.4,
        network_latency_us=14.0,
        kernel_us=2.0,
        shares_source=f"{_HOPPER_SHARES}; {_NETWORK}; {_COPY}; {_LATENCY}",
        assumed=_ASSUMED,
    ),
    "b200": Hardware(
        gpu="b200",
        label="B200",
        memory_bytes=183359 * _MIB,
        bf16_tflops=2250.0,
        float32_tflops=75.0,
        memory_gb_per_s=8000.0,
        link_gb_per_s=900.0,
        network_gb_per_s=50.0,
        gpus_per_node=8,
        source="NVIDIA DGX B200 data sheet (2024), eight 400 Gb/s adapters; nvidia-smi",
        matmul_share=0.66,
        attention_share=0.5,
        memory_share=0.9,
        gather_share=0.8,
        row_overhead_bytes=64,
        link_share=0.82,
        network_share=0.94,
        link_latency_us=3.4,
        network_latency_us=14.0,
        kernel_us=2.0,
        shares_source=f"{_B200_SHARES}; {_NETWORK}; {_COPY}; {_LATENCY}",
        assumed=f"memory_share, link_share: as on an H200; {_ASSUMED}",
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
    def kind(self) -> Hardware | None:
        """What is known of the GPU; None for a CPU."""
        return GPUS[self.gpu] if self.gpu else None
