"""Memory of a run before it is started: bytes of every rank by kind, from formulas alone.

`estimate` adds up what `dense`, `tables`, `activations`, `passes` and `reserved` say of a stage; `check_fits` refuses
what does not fit. Nothing here imports torch or megatron. tests/test_estimate.py compares weights, gradients and states
with what the engine allocates, byte for byte, activations with what autograd saves, and the total with the most that a
step takes.
"""

from mempar.runtime.estimate.check import check_fits
from mempar.runtime.estimate.report import Estimate, StageBytes, estimate

__all__ = ["Estimate", "StageBytes", "check_fits", "estimate"]
