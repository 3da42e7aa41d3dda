"""The memory estimate as a table: kinds of bytes down, pipeline stages across, shares of a GPU."""

import io

from rich.console import Console
from rich.table import Table

from mempar.runtime.estimate import Estimate, StageBytes
from mempar.runtime.hardware import Gpu

# Kinds that exist between steps, during forward and backward passes, and during the update.
_HELD = ("weights", "gradients", "optimizer_state", "table_values", "table_state", "reserved")
_PASSES = ("records", "early_sums", "activations", "logits", "recomputed", "buffers")
_UPDATE = ("records", "row_sums")
# What the allocator may need beyond tensors, for it hands out blocks and cannot move them; a rule of thumb.
_SPARE_SHARE = 0.05
_NOTES = {
    "reserved": "reserved (assumed)",
    "recomputed": "block at hand, or logits",
    "early_sums": "records summed early",
}


def estimate_table(estimate: Estimate, gpu: Gpu | None) -> str:
    """Render an estimate.

    Args:
        estimate: of a run.
        gpu: what it is to fit; None for a CPU, which gives no shares.

    Returns:
        A table of GiB (MiB where all are small) and a line that says whether it fits.
    """
    unit, name = (2**30, "GiB") if estimate.worst.total >= 2**30 else (2**20, "MiB")
    table = Table(title=f"memory of a rank, {name}", title_justify="left")
    table.add_column("")
    for number in range(len(estimate.stages)):
        table.add_column(f"stage {number}", justify="right")
        if gpu is not None:
            table.add_column("of GPU", justify="right")

    def row(label: str, sizes: list[int], style: str = "") -> None:
        cells = []
        for size in sizes:
            cells.append(f"{size / unit:.2f}" if size else "-")
            if gpu is not None:
                cells.append(f"{size / gpu.memory_bytes:.1%}" if size else "")
        table.add_row(label, *cells, style=style)

    for kinds, total, words in (
        (_HELD, "held", "held between steps"),
        (_PASSES, "in_passes", "forward and backward"),
        (_UPDATE, "in_update", "or update of tables"),
    ):
        for kind in kinds:
            sizes = [_shown(stage, kind) for stage in estimate.stages]
            if any(sizes):
                row("  " + _NOTES.get(kind, kind.replace("_", " ")), sizes)
        sizes = [getattr(stage, total) for stage in estimate.stages]
        if any(sizes):
            row(words, sizes, style="bold")
        table.add_section()
    row("at most", [stage.total for stage in estimate.stages], style="bold")
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue().rstrip() + "\n" + _verdict(estimate, gpu)


def _shown(stage: StageBytes, kind: str) -> int:
    """Bytes of a kind; of logits and the block at hand the larger, which are not there together."""
    if kind == "logits":
        return 0
    return max(stage.logits, stage.recomputed) if kind == "recomputed" else getattr(stage, kind)


def _verdict(estimate: Estimate, gpu: Gpu | None) -> str:
    place = f"stage {estimate.worst_stage}" if len(estimate.stages) > 1 else "a rank"
    total = estimate.worst.total
    if gpu is None:
        return f"{place} needs {total / 2**20:.1f} MiB on {estimate.num_ranks} ranks"
    left = 1 - total / gpu.memory_bytes
    fits = "does not fit" if left < 0 else "fits" if left > _SPARE_SHARE else "fits barely, fragments may not"
    need = f"{place} needs {total / 2**30:.1f} of {gpu.memory_bytes / 2**30:.1f} GiB"
    return f"{need} on {estimate.num_ranks} {gpu.label}: {fits}"
