"""What the operations check of their arguments: shapes and dtypes always, row ids where the backend is told to."""

import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend


def require(holds: bool, name: str, tensor: Tensor, rule: str) -> None:
    """Raise ValueError with a tensor's shape and dtype unless a rule holds."""
    if not holds:
        found = f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        raise ValueError(f"{name} is {found}; it must have {rule}.")


def check_rows(name: str, table: Tensor) -> None:
    """Require rows `[S', D']` whose numbers lie side by side, whatever lies between two rows."""
    side_by_side = table.dim() == 2 and (table.stride(1) == 1 or table.shape[1] == 1 or not table.numel())
    require(side_by_side, name, table, "two dimensions and columns side by side")
    require(table.is_floating_point(), name, table, "numbers of a floating dtype")


def check_index(name: str, index: Tensor, table: Tensor, backend: Backend) -> None:
    """Require ids `[E]` of rows of a table; that they are in range is looked at if the backend checks indices."""
    fits = index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    require(fits, name, index, "one dimension of int32 or int64")
    require(index.device == table.device, name, index, f"its place on {table.device}")
    if backend.check_indices and index.numel():
        lowest, highest = (int(bound) for bound in index.aminmax())
        if lowest < 0 or highest >= len(table):
            raise IndexError(f"{name} holds ids from {lowest} to {highest}, but rows are 0 to {len(table) - 1}.")
