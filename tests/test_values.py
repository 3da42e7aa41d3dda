"""Gradient records of a shard: summed early beyond memory.deposit_bytes, or all at the end of a step."""

import pytest
import torch
from torch import Tensor

from mempar.memory.values import ValueShard
from shards import slice_of

pytestmark = pytest.mark.usefixtures("fresh_seed", "one_thread")
NUM_ROWS, WIDTH, TOKENS, READS = 40, 70, 6, 5


def shard(deposit_bytes: int, dtype: torch.dtype) -> ValueShard:
    part = slice_of(NUM_ROWS, WIDTH, (0, NUM_ROWS), (0, WIDTH))
    return ValueShard(part, seed=3, dtype=dtype, device=torch.device("cpu"), deposit_bytes=deposit_bytes)


def deposits(count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    offsets = torch.arange(0, TOKENS * READS + 1, READS, dtype=torch.int32)
    made = []
    for _ in range(count):
        # Few of the rows are drawn often.
        rows = (NUM_ROWS * torch.rand(TOKENS * READS) ** 3).int()
        made.append((rows, torch.randn(len(rows)).to(dtype), offsets, torch.randn(TOKENS, WIDTH).to(dtype)))
    # One that reads nothing, as a rank without tokens.
    made.insert(1, (rows[:0], torch.zeros(0, dtype=dtype), offsets[:1], torch.zeros(0, WIDTH, dtype=dtype)))
    return made


def gradient(deposit_bytes: int, made: list, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Rows, gradients, and the most bytes that records held."""
    table, most = shard(deposit_bytes, dtype), 0
    for deposit in made:
        table.backward(*deposit)
        most = max(most, table.record_bytes)
    rows, grads = table.take_gradient()
    assert table.record_bytes == 0 and len(table.take_gradient()[0]) == 0
    return rows, grads, most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deposit_bytes", [1, 3000, 10**9])
def test_records_summed_early_give_the_same_gradient(dtype: torch.dtype, deposit_bytes: int) -> None:
    made = deposits(12, dtype)
    rows, grads, _ = gradient(0, made, dtype)
    early_rows, early_grads, _ = gradient(deposit_bytes, made, dtype)
    assert torch.equal(rows, early_rows) and rows.dtype == early_rows.dtype == torch.int32
    assert grads.dtype == early_grads.dtype == torch.promote_types(dtype, torch.float32)
    # Sums of some tens of terms of size 1, in another order.
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(early_grads, grads, rtol=tolerance, atol=tolerance)
    again = gradient(deposit_bytes, made, dtype)
    assert torch.equal(again[0], early_rows) and torch.equal(again[1], early_grads)


def test_records_stay_within_deposit_bytes_and_the_touched_rows() -> None:
    made = deposits(60, torch.float32)
    _, _, unlimited = gradient(0, made, torch.float32)
    limit = unlimited // 10
    rows, _, most = gradient(limit, made, torch.float32)
    # A pair of a row and its gradient: row, weight, bag and D_j numbers; one deposit may exceed the limit.
    pairs = len(rows) * (12 + 4 * WIDTH)
    assert most <= limit + unlimited // 60 + pairs + 100 < unlimited // 2


def test_gradient_is_the_same_when_columns_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mempar.kernels import blocking

    made = deposits(4, torch.float64)
    rows, grads, _ = gradient(0, made, torch.float64)
    monkeypatch.setattr(blocking, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blocking, "_BLOCK_COLUMNS", 9)
    block_rows, block_grads, _ = gradient(0, made, torch.float64)
    assert torch.equal(rows, block_rows)
    torch.testing.assert_close(block_grads, grads, rtol=1e-14, atol=1e-14)
