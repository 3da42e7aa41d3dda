"""Counting the bytes that are handed to collectives, phase by phase.

The count is taken from the tensors themselves and knows nothing of the formulas in cost.py: the
bytes law compares the two.
"""

from collections import Counter


class ByteLedger:
    """Bytes sent by this rank, what it keeps for itself excluded.

    Phases of the exchange: `split_sizes` (C), `entries` (F1), `values` (F2), `output_grads` (B1),
    `score_grads` (B2); on two-hop grids `values_inside`, `values_across`, `output_grads_across` and
    `output_grads_inside` stand for F2 and B1; around it `token_gather` and `score_gather` (tensor-parallel token split)
    and `copy_sync` (replicas and stage copies).
    """

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, phase: str, num_bytes: int) -> None:
        """Count one collective call."""
        self.sent_bytes[phase] += num_bytes
        self.calls[phase] += 1

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.sent_bytes.clear()
        self.calls.clear()
