"""On a GPU: tables and results of more than 2^31 numbers, and results that are the same bit for bit again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend, choose_backend
from mempar.kernels.product_topk import product_topk
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.weighted_gather import gather_scores, weighted_gather

pytestmark = pytest.mark.gpu
WIDTH, READS = 2048, 128
# 2.3e9 numbers, 4.6 GB in bf16.
NUM_ROWS = 1_120_000


@pytest.fixture(scope="module")
def backend() -> Backend:
    return choose_backend("triton", "cuda")


@pytest.fixture(scope="module")
def table() -> Tensor:
    """Rows that hold their own number in every column, modulo a prime that bf16 holds exactly."""
    assert NUM_ROWS * WIDTH > 2**31
    numbers = (torch.arange(NUM_ROWS, device="cuda") % 251).to(torch.bfloat16)
    return numbers[:, None].expand(-1, WIDTH).contiguous()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_2_to_the_31_numbers_are_read(table: Tensor, index_dtype: torch.dtype, backend: Backend) -> None:
    rows = torch.arange(NUM_ROWS - 1000, NUM_ROWS, dtype=index_dtype, device="cuda")
    offsets = torch.arange(1001, dtype=index_dtype, device="cuda")
    ones = torch.ones(1000, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(weighted_gather(table, rows, ones, offsets, backend=backend), table[-1000:])
    grad = torch.zeros(1, WIDTH, dtype=torch.bfloat16, device="cuda")
    grad[:, -1] = 1
    scores = gather_scores(table, rows, torch.zeros_like(rows), grad, backend=backend)
    assert torch.equal(scores, table[-1000:, -1])


def test_sums_beyond_2_to_the_31_numbers_are_written(backend: Backend) -> None:
    entries = torch.arange(NUM_ROWS, dtype=torch.int32, device="cuda")
    grad = torch.randn(64, WIDTH, device="cuda")
    rows, sums = reduce_rows(entries, torch.ones(NUM_ROWS, device="cuda"), entries % 64, grad, backend=backend)
    assert torch.equal(rows, entries)
    assert torch.equal(sums[-64:], grad[(entries[-64:] % 64).long()])


def _gather(backend: Backend) -> Callable[[], object]:
    values = torch.randn(1 << 16, WIDTH, device="cuda").to(torch.bfloat16)
    rows = torch.randint(1 << 16, (4096 * READS,), dtype=torch.int32, device="cuda")
    weight = torch.rand(4096 * READS, device="cuda").to(torch.bfloat16)
    offsets = torch.arange(0, 4096 * READS + 1, READS, dtype=torch.int32, device="cuda")
    return lambda: weighted_gather(values, rows, weight, offsets, backend=backend)


def _reduce(backend: Backend) -> Callable[[], object]:
    # A quarter of the entries hits one row: it is summed in pieces.
    rows = torch.randint(1 << 12, (1 << 18,), dtype=torch.int32, device="cuda")
    rows[torch.rand(1 << 18, device="cuda") < 0.25] = 7
    weight, grad = torch.rand(1 << 18, device="cuda"), torch.randn(1 << 11, WIDTH, device="cuda")
    bags = torch.arange(1 << 18, dtype=torch.int32, device="cuda") // 128
    return lambda: reduce_rows(rows, weight, bags, grad, backend=backend)[1]


def _topk(backend: Backend) -> Callable[[], object]:
    query = torch.randn(2048, 4, 2, 256, device="cuda").to(torch.bfloat16).requires_grad_()
    keys = torch.randn(4, 2, 1024, 256, device="cuda").to(torch.bfloat16).requires_grad_()
    grad = torch.randn(2048, 4, 32, device="cuda")

    def choose() -> list[Tensor]:
        slots, weight = product_topk(query, keys, 32, score_dtype=torch.bfloat16, backend=backend)
        return [slots, weight, *torch.autograd.grad(weight, (query, keys), grad)]

    return choose


@pytest.mark.parametrize("operation", [_gather, _reduce, _topk])
def test_results_are_the_same_bit_for_bit_again(operation: Callable, backend: Backend) -> None:
    run = operation(backend)
    first, *others = (run() for _ in range(4))
    for other in others:
        pairs = zip(first, other, strict=True) if isinstance(first, list) else [(first, other)]
        assert all(torch.equal(one, same) for one, same in pairs)
