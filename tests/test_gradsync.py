"""Row gradients of replicas and copies."""

from collections.abc import Callable

import pytest
import torch

from mempar.parallel.collectives import MemberGroup
from mempar.parallel.cost import copy_sync_bytes
from mempar.parallel.gradsync import sum_over_copies
from mempar.parallel.ledger import ByteLedger
from shards import TESTED
from thread_groups import sent

pytestmark = pytest.mark.usefixtures("rng")


def test_sum_over_copies_of_one_changes_and_sends_nothing() -> None:
    group = MemberGroup(None, ByteLedger())
    rows, grad = torch.tensor([1, 4], dtype=torch.int32), torch.randn(2, 3)
    same_rows, same_grad = sum_over_copies(rows, grad, group, backend=TESTED)
    assert torch.equal(same_rows, rows) and torch.equal(same_grad, grad)
    assert sent(group.ledger) == {}
    assert copy_sync_bytes(1, 2, num_columns=3, grad_bytes=4) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_over_copies_is_bitwise_the_same_on_all_of_them(in_threads: Callable, dtype: torch.dtype) -> None:
    # The first row only on member 0, none on member 1, shared ones on the others.
    rows = [torch.tensor(touched, dtype=torch.int32) for touched in ([0, 3, 5], [], [3, 5, 9], [3, 7])]
    grads = [torch.randn(len(touched), 33, dtype=dtype) for touched in rows]

    def work(group: MemberGroup) -> tuple:
        union, total = sum_over_copies(rows[group.rank], grads[group.rank], group, backend=TESTED)
        return union, total, sent(group.ledger)

    dense = torch.zeros(10, 33, dtype=torch.float64)
    for touched, grad in zip(rows, grads, strict=True):
        dense.index_add_(0, touched, grad.double())
    results = in_threads(4, work)
    for rank, (union, total, bytes_sent) in enumerate(results):
        assert union.tolist() == [0, 3, 5, 7, 9]
        assert torch.equal(total, results[0][1])
        # Three terms of size one.
        torch.testing.assert_close(total.double(), dense[union.long()], rtol=0, atol=20 * torch.finfo(dtype).eps)
        expected = copy_sync_bytes(4, len(rows[rank]), num_columns=33, grad_bytes=dtype.itemsize)
        assert bytes_sent == {"copy_sync": expected}
        assert expected == 3 * (8 + len(rows[rank]) * (4 + 33 * dtype.itemsize))
