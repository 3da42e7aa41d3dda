"""Lookups shared by tensor-parallel ranks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.marks import Marks
from mempar.memory.lookup import LocalReader
from mempar.memory.values import ValueShard
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.cost import token_split_bytes
from mempar.parallel.token_split import TokenSplitReader
from thread_groups import plan_of, sent

pytestmark = pytest.mark.usefixtures("rng")


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 6])
def test_token_split_reads_as_one_rank_would(in_threads: Callable, tp: int, num_tokens: int) -> None:
    part, dtype, reads = plan_of(1, 1).part_of(0), torch.float64, 4
    slot, weight = torch.randint(25, (num_tokens, reads)), torch.randn(num_tokens, reads, dtype=dtype)
    grad = torch.randn(num_tokens, 7, dtype=dtype)

    def read(reader_of: Callable[[LocalReader], Any]) -> tuple[Tensor, Tensor, Tensor]:
        shard = ValueShard(part, seed=5, dtype=dtype, device=torch.device("cpu"))
        mine = weight.clone().requires_grad_()
        reader = reader_of(LocalReader(shard))
        out = reader.read(reader.find(slot, [num_tokens] * tp), mine)
        out.backward(grad)
        rows, row_grads = shard.take_gradient()
        return out.detach(), mine.grad, torch.zeros(25, 7, dtype=dtype).index_copy(0, rows.long(), row_grads)

    def work(group: MemberGroup) -> tuple:
        members = list(range(group.size))
        return *read(lambda inner: TokenSplitReader(inner, group, members)), sent(group.ledger)

    out, weight_grad, table_grad = read(lambda inner: inner)
    results = in_threads(tp, work)
    # Every rank deposits for its own tokens only.
    torch.testing.assert_close(sum(result[2] for result in results), table_grad, rtol=0, atol=1e-12)
    shares = [len(share) for share in torch.arange(num_tokens).tensor_split(tp)]
    for rank, (split_out, split_grad, _, bytes_sent) in enumerate(results):
        torch.testing.assert_close(split_out, out, rtol=0, atol=1e-12)
        torch.testing.assert_close(split_grad, weight_grad, rtol=0, atol=1e-12)
        given = {"value_dim": 7, "reads": reads, "value_bytes": 8, "score_bytes": 8}
        expected = dict(
            zip(("token_gather", "score_gather"), token_split_bytes(tp, shares[rank], **given), strict=True)
        )
        assert bytes_sent == expected
        assert expected["token_gather"] == (tp - 1) * shares[rank] * 7 * 8
        assert expected["score_gather"] == (tp - 1) * shares[rank] * reads * 8


def test_token_split_tells_the_inner_reader_each_members_share() -> None:
    inner = SimpleNamespace(find=lambda slots, counts: (slots, counts))
    reader = TokenSplitReader(inner, SimpleNamespace(size=3, rank=1, marks=Marks()), [0, 1, 2, 0, 1, 2])
    share = reader.find(torch.arange(8)[:, None], [8, 8, 8, 4, 4, 4])
    slots, counts = share.found
    assert (slots.tolist(), share.sizes) == ([[3], [4], [5]], [3, 3, 2])
    assert counts == [3, 3, 2, 2, 1, 1]
