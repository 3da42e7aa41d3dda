"""What a GPU's memory holds beside tensors: assumptions, since nothing here can measure them.

On one H100 node of eight, NCCL 2.2x, a process held 1.06 GB before its first all-to-all and 4.34 GB after it: 32
channels to each of 7 peers (github.com/NVIDIA/nccl issue 1685, 2025-04; its figures leave torch's tensors out). Over
networks sends and receives share one buffer, 512 MiB where it was seen (issue 2363, 2026-08). NCCL's default buffer of
a ring is 4 MiB a channel and direction (NCCL_BUFFSIZE).
"""

from mempar.runtime.estimate.layout import Layout

# The driver's context, kernels, cuBLAS's workspace.
_CONTEXT_BYTES = 1_060_000_000
# (4.34 GB - 1.06 GB) / 7 of the above.
_PEER_BYTES = 470_000_000
_NETWORK_BYTES = 512 << 20
# 32 channels of two rings' buffers of 4 MiB.
_RING_BYTES = 32 * 2 * (4 << 20)


def reserved_bytes(layout: Layout, stage: int) -> int:
    """Bytes of contexts and of communicators of a rank of a stage; 0 on a CPU."""
    gpu = layout.run.hardware.kind
    if gpu is None:
        return 0
    grid = layout.grid
    rings = [grid.tp, grid.cp, grid.stage_size // grid.tp, grid.pp, grid.world]
    has_experts = any(block in layout.run.moe_layers for chunk in layout.chunks_of(stage) for block in chunk.blocks)
    # (ranks, distance between them) of groups that send from each to each.
    spread = [(grid.ep, grid.tp)] if has_experts else []
    if stage in layout.placement.table_stages:
        spread.append((grid.mp, 1))
        if grid.mp_hops == 2:
            spread += [(grid.mp_rows, 1), (grid.mp_columns, grid.mp_rows)]
        spread.append((grid.stage_size // grid.mp, grid.mp))
        if not layout.run.parallel.sequence_parallel:
            spread.append((grid.tp, 1))
    total = _CONTEXT_BYTES + _RING_BYTES * sum(size > 1 for size in rings)
    for size, distance in spread:
        inside = max(1, min(size, gpu.gpus_per_node // distance))
        total += _PEER_BYTES * (inside - 1) + (_NETWORK_BYTES if size > inside else 0)
    return total
