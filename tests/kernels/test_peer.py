"""Experts of one neuron, from two tables at once, and their gradients, against their definition."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bags import INDEX_DTYPES, NUM_ROWS, WIDTHS, every_case, every_dtype, make_bags
from mempar.dims import TableSlice
from mempar.kernels.dispatch import Backend
from mempar.kernels.peer import peer, peer_backward, reference
from mempar.kernels.weighted_gather import bag_of_entries
from mempar.memory.lookup import LocalReader, Readers
from mempar.memory.values import ValueShard


def make_experts(case: str, width: int, dtype: torch.dtype, index_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """down [S, D], values [S, D], row_index [E], weight [E], offsets [B + 1], x [B, D], grad [B, D]."""
    values, row_index, weight, offsets, grad = make_bags(case, width, dtype, index_dtype)
    down, x = torch.where(values.isnan(), values, torch.randn_like(values)), torch.randn_like(grad) / width**0.5
    # gelu bends where its argument is about one.
    return down, values, row_index, weight.to(torch.promote_types(dtype, torch.float32)), offsets, x, grad


def differentiate(
    down: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The definition in float64: sums, products, gradients of x, weight, down and values."""
    down, values, weight, x = (tensor.double().nan_to_num().requires_grad_() for tensor in (down, values, weight, x))
    out, hidden = reference.peer(down, values, row_index, weight, offsets, x)
    grads = torch.autograd.grad(out, (x, weight, down, values), grad.double())
    return out.detach(), hidden.detach(), *grads


def row_gradient(like: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, vectors: Tensor) -> Tensor:
    """The dense gradient that coefficients of rows and vectors of bags make, in float64."""
    parts = weight.double()[:, None] * vectors.double()[bag_of_entries(offsets, len(weight)).long()]
    return torch.zeros_like(like, dtype=torch.float64).index_add_(0, row_index.long(), parts)


def check_experts(experts: tuple[Tensor, ...], backend: Backend) -> None:
    """Compare sums, products and all gradients with the definition."""
    down, values, row_index, weight, offsets, x, grad = experts
    dtype, wide = values.dtype, weight.dtype
    out, hidden = peer(down, values, row_index, weight, offsets, x, backend=backend)
    grads = peer_backward(down, values, row_index, weight, offsets, hidden, grad, backend=backend)
    kinds = [tensor.dtype for tensor in (out, hidden, *grads)]
    assert kinds == [dtype, wide, dtype, wide, dtype, dtype]
    found = (
        out,
        hidden,
        grads.x,
        grads.weight,
        row_gradient(down, row_index, grads.down_weight, offsets, x),
        row_gradient(values, row_index, grads.value_weight, offsets, grad),
    )
    # Of numbers without signs all sums are as large as what is rounded on the way to them.
    unsigned = [tensor if tensor is offsets or tensor is row_index else tensor.abs() for tensor in experts]
    # Sums have up to D or M terms. In float32 and float64 every one is rounded; in bf16 they are kept in float32, and
    # what is rounded, a few times, are results.
    num_terms = max([values.shape[1], *offsets.diff().tolist()])
    tolerance = (8 if dtype == torch.bfloat16 else 8 + 2 * num_terms) * torch.finfo(dtype).eps
    for actual, expected, magnitude in zip(found, differentiate(*experts), differentiate(*unsigned), strict=True):
        largest = max(1.0, magnitude.max().item()) if magnitude.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * largest)


@every_case
@every_dtype
def test_peer_matches_reference(case: str, dtype: torch.dtype, backend: Backend) -> None:
    for width, index_dtype in zip(WIDTHS, itertools.cycle(INDEX_DTYPES), strict=False):
        check_experts(make_experts(case, width, dtype, index_dtype), backend)


# Every example is tested with the same backend.
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), width=st.integers(1, 40))
def test_peer_of_any_small_shape(sizes: list[int], width: int, backend: Backend) -> None:
    num_entries, num_bags = sum(sizes), len(sizes)
    down, values = torch.randn(2, 3, width, dtype=torch.float64)
    row_index = torch.randint(3, (num_entries,))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    x, grad = torch.randn(2, num_bags, width, dtype=torch.float64)
    weight = torch.randn(num_entries, dtype=torch.float64)
    check_experts((down, values, row_index, weight, offsets, x, grad), backend)


def test_peer_reads_rows_that_lie_apart(backend: Backend) -> None:
    experts = make_experts("uneven", 33, torch.float32, torch.int32)
    down, values, row_index, weight, offsets, x, grad = experts
    apart = [torch.full((len(each), 40), torch.nan) for each in (down, values, x, grad)]
    for wide, narrow in zip(apart, (down, values, x, grad), strict=True):
        wide[:, 3:36] = narrow
    down, values, x, grad = (wide[:, 3:36] for wide in apart)
    check_experts((down, values, row_index, weight, offsets, x, grad), backend)


def test_peer_does_not_vary(backend: Backend) -> None:
    down, values, row_index, weight, offsets, x, grad = make_experts("duplicates", 100, torch.float32, torch.int32)
    given = (down, values, row_index, weight, offsets)
    out, hidden = peer(*given, x, backend=backend)
    again = peer(*given, x, backend=backend)
    assert torch.equal(out, again[0]) and torch.equal(hidden, again[1])
    grads = peer_backward(*given, hidden, grad, backend=backend)
    for first, second in zip(grads, peer_backward(*given, hidden, grad, backend=backend), strict=True):
        assert torch.equal(first, second)


def test_peer_checks_what_it_is_given(backend: Backend, checking: Backend) -> None:
    down, values, row_index, weight, offsets, x, grad = make_experts("uneven", 7, torch.bfloat16, torch.int32)
    with pytest.raises(ValueError, match=r"weight is .* a number of torch.float32 for each of 35 entries"):
        peer(down, values, row_index, weight.bfloat16(), offsets, x, backend=backend)
    with pytest.raises(ValueError, match="x is"):
        peer(down, values, row_index, weight, offsets, x[1:], backend=backend)
    with pytest.raises(ValueError, match="down is"):
        peer(down[:, 1:], values, row_index, weight, offsets, x, backend=backend)
    with pytest.raises(ValueError, match="hidden is"):
        peer_backward(down, values, row_index, weight, offsets, weight[1:], grad, backend=backend)
    with pytest.raises(IndexError, match="row_index holds ids"):
        peer(down, values, row_index + NUM_ROWS, weight, offsets, x, backend=checking)


def make_readers(width: int, backend: Backend, dtype: torch.dtype = torch.float64) -> Readers:
    """Two whole tables."""
    part = TableSlice(
        num_slots=NUM_ROWS, value_dim=width, row_start=0, row_end=NUM_ROWS, column_start=0, column_end=width
    )
    readers = []
    for number in range(2):
        device = torch.get_default_device()
        shard = ValueShard(part, seed=3, number=number, dtype=dtype, device=device, backend=backend)
        shard.values.normal_()
        readers.append(LocalReader(shard))
    return Readers(values=readers[0], down=readers[1])


def test_experts_of_a_reader_pass_gradcheck(backend: Backend) -> None:
    readers = make_readers(3, backend)
    slots = torch.tensor([[1, 1, 4], [0, NUM_ROWS - 1, 4]])
    found = readers.values.find(slots)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    # The gradient of the rows is deposited, which the check does not look at.
    torch.autograd.gradcheck(lambda *given: readers.read_experts(found, *given), (weight, x))


class Apart:
    """A reader that is not known to lie here."""

    def __init__(self, reader: LocalReader) -> None:
        self.find, self.read, self.dot = reader.find, reader.read, reader.dot


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_experts_in_one_step_agree_with_two(num_tokens: int, backend: Backend) -> None:
    readers = make_readers(33, backend)
    apart = Readers(values=Apart(readers.values), down=Apart(readers.down))
    slots = torch.randint(NUM_ROWS, (num_tokens, 6))
    given = [torch.randn(num_tokens, width, dtype=torch.float64) for width in (6, 33)]
    cotangent = torch.randn(num_tokens, 33, dtype=torch.float64)
    outcomes = []
    for each in (readers, apart):
        weight, x = (tensor.clone().requires_grad_() for tensor in given)
        out = each.read_experts(readers.values.find(slots), weight, x)
        out.backward(cotangent)
        records = [table.shard.take_gradient() for table in (readers.values, readers.down)]
        outcomes.append([out.detach(), weight.grad, x.grad, *(tensor for record in records for tensor in record)])
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
