"""The roofline of one device: how long matrix products, passes over memory and reads of rows take.

An operation takes the longer of its arithmetic and its bytes, at the shares of the peaks that a hardware description
states, and `kernel_us` besides. Caches are not modelled: what is written and read again goes through memory.
"""

from dataclasses import dataclass

from mempar.runtime.hardware import Hardware

# Bytes a microsecond of one GB/s, FLOPs a microsecond of one TFLOP/s.
_BYTES, _FLOPS = 1e3, 1e6


@dataclass(frozen=True)
class Roofline:
    """One device, and the width of the numbers that a run computes with.

    Attributes:
        hardware: the device.
        value_bytes: bytes of a parameter and of an activation: 2, 4 or 8.
    """

    hardware: Hardware
    value_bytes: int

    @property
    def peak_tflops(self) -> float:
        """Peak of matrix products of the run's numbers."""
        if self.value_bytes == 2:
            return self.hardware.bf16_tflops
        return self.hardware.float32_tflops * 4 / self.value_bytes

    def products(self, rows: float, inner: float, columns: float) -> float:
        """Microseconds of a product `[rows, inner] x [inner, columns]`."""
        num_bytes = self.value_bytes * (rows * inner + inner * columns + rows * columns)
        arithmetic = 2 * rows * inner * columns / (self.peak_tflops * self.hardware.matmul_share * _FLOPS)
        return max(arithmetic, self.bytes(num_bytes) - self.hardware.kernel_us) + self.hardware.kernel_us

    def attention(self, flops: float) -> float:
        """Microseconds of fused attention."""
        rate = self.peak_tflops * self.hardware.attention_share * _FLOPS
        return flops / rate + self.hardware.kernel_us

    def bytes(self, num_bytes: float, operations: int = 1) -> float:
        """Microseconds of operations that read and write so many bytes in order, all together."""
        rate = self.hardware.memory_gb_per_s * self.hardware.memory_share * _BYTES
        return num_bytes / rate + operations * self.hardware.kernel_us

    def passes(self, elements: float, passes: float, operations: int = 1) -> float:
        """Microseconds of operations that pass so often over so many of the run's numbers."""
        return self.bytes(elements * passes * self.value_bytes, operations)

    def rows(self, reads: float, row_bytes: float) -> float:
        """Microseconds of an operation that reads rows in no order."""
        rate = self.hardware.memory_gb_per_s * self.hardware.gather_share * _BYTES
        return reads * (row_bytes + self.hardware.row_overhead_bytes) / rate + self.hardware.kernel_us
