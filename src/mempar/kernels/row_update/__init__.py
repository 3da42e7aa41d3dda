"""Rules of optimizers applied to the touched rows of a shard, values and state in one pass.

`update_rows` takes reduced gradients; `reduce_and_update` takes what backward deposited, and sums and applies it
without ever holding the rows' gradients `[U, D_j]`; `backward_and_update` computes the gradient of the weights in the
same pass, so that each touched row is read and written once.

**Where the last two may run.** Clipping needs the norm of the rows' gradients before any is applied, skipping a step
needs to know that all numbers are finite, and copies of a shard must sum their gradients first: each needs the
gradients materialised. So `reduce_and_update` is for shards without copies, clip and skipping. `backward_and_update`
moreover changes the table while backward runs: one memory layer alone reads it, in one micro-batch of the step.

    m <- b1 m + (1 - b1) g                         Adam, g already scaled
    v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    a <- a + mean over the tile's columns of g^2   row-wise Adagrad, a number for each tile of columns
    w <- (1 - lr wd) w - lr g / (sqrt(a) + eps)

memory/optimizer says what the rules mean; rounding.py, how bf16 numbers are kept. Nothing is atomic: results do not
vary from run to run.
"""

from collections.abc import Sequence

from torch import Tensor

from mempar.kernels.checks import check_index, check_rows, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import check_entries, reduce_row_parts
from mempar.kernels.row_update import native
from mempar.kernels.row_update.rows import Adagrad, Adam, Rule, TableRows, check_table
from mempar.kernels.weighted_gather import gather_scores

__all__ = ["Adagrad", "Adam", "Rule", "TableRows", "backward_and_update", "reduce_and_update", "update_rows"]


def update_rows(
    table: TableRows,
    rule: Rule,
    rows: Tensor,
    grad: Tensor,
    *,
    step: int,
    scale: float = 1.0,
    backend: Backend,
) -> None:
    """Apply a rule to touched rows, in place; the other rows keep values and state bit for bit.

    Args:
        table: values of the shard.
        rule: what moves them, and its state.
        rows: `[U] int32 or int64`, distinct rows of the shard.
        grad: `[U, D_j]` of any floating dtype.
        step: the optimizer's, counted from 1.
        scale: the gradient is multiplied by this first.
        backend: what computes it.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row is out of range; looked for if the backend checks indices.
    """
    check_table(table, rule)
    check_rows("grad", grad)
    check_index("rows", rows, table.values, backend)
    shape = (len(rows), table.values.shape[1])
    require(grad.shape == shape, "grad", grad, f"shape {list(shape)}")
    if backend.is_triton:
        from mempar.kernels.row_update import fused

        fused.update_rows(table, rule, rows.contiguous(), grad, step=step, scale=scale)
    else:
        native.update_rows(table, rule, rows, grad, step=step, scale=scale)


def reduce_and_update(
    table: TableRows,
    rule: Rule,
    row_index: Tensor,
    weight: Tensor,
    bag_index: Tensor,
    grads: Sequence[Tensor],
    *,
    step: int,
    scale: float = 1.0,
    backend: Backend,
) -> Tensor:
    """Sum deposited entries by row and apply a rule to the sums; see the module for where this is allowed.

    Args:
        table: values of the shard.
        rule: what moves them, and its state.
        row_index: `[E] int32 or int64`, rows of the shard.
        weight: `[E]`.
        bag_index: `[E] int32 or int64`, rows of all parts one after the other.
        grads: `[B_i, D_j]` each, one at least; of the dtype of arithmetic and one more.
        step: the optimizer's, counted from 1.
        scale: the sums are multiplied by this first.
        backend: what computes it.

    Returns:
        `rows [U]`, those that were touched, ascending.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row or bag is out of range; looked for if the backend checks indices.
    """
    check_table(table, rule)
    check_index("row_index", row_index, table.values, backend)
    weight = weight.to(table.wide)
    _check_entries(table, row_index, weight, bag_index, grads, backend)
    if backend.is_triton:
        from mempar.kernels.row_update import fused

        return fused.reduce_and_update(table, rule, row_index, weight, bag_index, grads, step=step, scale=scale)
    rows, sums = reduce_row_parts(row_index, weight, bag_index, grads, backend=backend)
    native.update_rows(table, rule, rows, sums, step=step, scale=scale)
    return rows


def backward_and_update(
    table: TableRows,
    rule: Rule,
    row_index: Tensor,
    weight: Tensor,
    bag_index: Tensor,
    grad: Tensor,
    *,
    step: int,
    scale: float = 1.0,
    backend: Backend,
) -> Tensor:
    """Differentiate `weighted_gather` and apply a rule to the rows' gradient; see the module for where this is allowed.

    Args:
        table: values of the shard, as they were read forward.
        rule: what moves them, and its state.
        row_index: `[E] int32 or int64`, rows of the shard.
        weight: `[E]`, as given to `weighted_gather`.
        bag_index: `[E]`, rows of `grad`, the dtype of `row_index`.
        grad: `[B, D_j]`, gradient of the bags' sums, the dtype of the values.
        step: the optimizer's, counted from 1.
        scale: the rows' gradient is multiplied by this first; the weights' is not.
        backend: what computes it.

    Returns:
        `[E]`, gradient of the weights with the values as they were before, in their dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row or bag is out of range; looked for if the backend checks indices.
    """
    check_table(table, rule)
    check_index("row_index", row_index, table.values, backend)
    wide_weight = weight.to(table.wide)
    _check_entries(table, row_index, wide_weight, bag_index, [grad], backend)
    require(grad.dtype == table.values.dtype, "grad", grad, f"the dtype of values, {table.values.dtype}")
    if backend.is_triton:
        from mempar.kernels.row_update import fused

        scores = table.values.new_empty(len(row_index))
        entries = (row_index, wide_weight, bag_index, [grad])
        fused.reduce_and_update(table, rule, *entries, step=step, scale=scale, scores=scores)
        return scores
    scores = gather_scores(table.values, row_index, bag_index, grad, backend=backend)
    rows, sums = reduce_row_parts(row_index, wide_weight, bag_index, [grad], backend=backend)
    native.update_rows(table, rule, rows, sums, step=step, scale=scale)
    return scores


def _check_entries(
    table: TableRows,
    row_index: Tensor,
    weight: Tensor,
    bag_index: Tensor,
    grads: Sequence[Tensor],
    backend: Backend,
) -> None:
    check_entries(row_index, weight, bag_index, grads, backend)
    width = table.values.shape[1]
    require(grads[0].shape[1] == width, "grad", grads[0], f"the columns of values, {width}")
