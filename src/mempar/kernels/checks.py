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


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Require that tensors lie on one device, those that are there."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.device == device, name, tensor, f"its place on {device}, not on {tensor.device}")


def check_index(name: str, index: Tensor, table: Tensor, backend: Backend) -> None:
    """Require ids `[E]` of rows of a table; that they are in range is looked at if the backend checks indices."""
    check_device(table.device, **{name: index})
    check_ids(name, index, len(table), backend)


def check_ids(name: str, index: Tensor, count: int, backend: Backend) -> None:
    """Require ids `[E]` below a count; that they are is looked at if the backend checks indices."""
    fits = index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    require(fits, name, index, "one dimension of int32 or int64")
    check_range(name, index, count, backend)


def check_range(name: str, index: Tensor, count: int, backend: Backend) -> None:
    """Look whether ids of any shape are from 0 to below a count, if the backend checks indices."""
    if backend.check_indices and index.numel():
        lowest, highest = (int(bound) for bound in index.aminmax())
        if lowest < 0 or highest >= count:
            raise IndexError(f"{name} holds ids from {lowest} to {highest}, but they are 0 to {count - 1}.")


def check_offsets(offsets: Tensor, row_index: Tensor, backend: Backend) -> None:
    """Require bounds `[B + 1]` of bags of entries; that they are such is looked at if the backend checks indices."""
    fits = offsets.dim() == 1 and offsets.numel() > 0 and offsets.dtype == row_index.dtype
    require(fits, "offsets", offsets, "the dtype of row_index, one dimension and one number at least")
    check_device(row_index.device, offsets=offsets)
    if backend.check_indices:
        bounds, num_entries = offsets.tolist(), row_index.numel()
        if bounds[0] != 0 or bounds[-1] != num_entries or bounds != sorted(bounds):
            raise IndexError(f"offsets go from {bounds[0]} to {bounds[-1]}; they must ascend from 0 to {num_entries}.")
