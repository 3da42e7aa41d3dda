"""The cure for machines without CUDA, and float64 through megatron's cross entropy."""

import pytest
import torch

from mempar.runtime import cpu, mcore
from mempar.runtime.float64 import keep_wide_logits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cure is a no-op with CUDA")


def test_cuda_entry_points_mean_the_cpu() -> None:
    assert mcore.RUNS_ON_CPU
    for tensor in (torch.zeros(2, device="cuda"), torch.empty(3, device=torch.cuda.current_device())):
        assert tensor.device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())


def test_tensors_are_made_where_a_context_says() -> None:
    # Models are made without memory like this, by transformers too.
    with torch.device("meta"):
        made = [
            torch.empty(2),
            torch.zeros(2),
            torch.ones(2),
            torch.full((2,), 1.0),
            torch.arange(2),
            torch.tensor([1]),
        ]
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_cure_is_a_no_op_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.Tensor.type
    assert cpu.install(None) is False
    assert torch.Tensor.type is before


class _Float32CrossEntropy:
    @staticmethod
    def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        return logits, logits.max(dim=-1)[0]


def test_cross_entropy_keeps_float64_and_nothing_else() -> None:
    keep_wide_logits(_Float32CrossEntropy)
    mended = _Float32CrossEntropy.calculate_logits_max
    keep_wide_logits(_Float32CrossEntropy)
    assert _Float32CrossEntropy.calculate_logits_max is mended
    for given, kept in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        logits, largest = mended(torch.rand(2, 3, dtype=given))
        assert logits.dtype == largest.dtype == kept
