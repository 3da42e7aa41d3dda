"""The sorts of `product_topk` of torch's operators, and their rule for ties."""

import pytest
import torch

from mempar.kernels.product_topk.native import packed_topk
from mempar.kernels.product_topk.stable import stable_topk


@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 3, 9)])
@pytest.mark.parametrize("top_k", [1, 4, 8, 9])
@pytest.mark.parametrize("spread", [1, 3, 10**6])
def test_sorts_match_stable_sort(shape: tuple[int, ...], top_k: int, spread: int) -> None:
    values = torch.randint(-spread, spread + 1, shape).float() / 7
    sorted_values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    for best, position in (stable_topk(values, top_k), packed_topk(values, torch.arange(9), top_k)):
        assert torch.equal(best, sorted_values[..., :top_k])
        assert torch.equal(position, order[..., :top_k])


@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_sorts_order_equal_values_by_number(top_k: int) -> None:
    values = torch.randint(3, (50, 9)).float()
    number = torch.stack([torch.randperm(100)[:9] for _ in range(50)])
    best, position = stable_topk(values, top_k, number)
    for row, key, value, place in zip(values.tolist(), number.tolist(), best.tolist(), position.tolist(), strict=True):
        order = sorted(range(9), key=lambda index: (-row[index], key[index]))[:top_k]
        assert place == order
        assert value == [row[index] for index in order]
    packed_best, packed_number = packed_topk(values, number, top_k)
    assert torch.equal(packed_best, best)
    assert torch.equal(packed_number, number.gather(-1, position))


def test_sorts_treat_signed_zeros_as_equal() -> None:
    values = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]])
    assert stable_topk(values, 3)[1].tolist() == packed_topk(values, torch.arange(5), 3)[1].tolist() == [[0, 1, 3]]
