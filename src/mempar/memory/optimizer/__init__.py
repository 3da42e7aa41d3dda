"""Optimizers of a table shard, and what they do to a row: the semantics, with formulas.

All take the reduced gradient of the touched rows, g [U, D_j], already scaled and clipped, and never make
a gradient of the table's shape. A row is **touched** in a step when any token of the global batch read
it, in any layer, masked tokens too and whatever its gradient; its gradient is the sum over the batch
divided by the number of unmasked tokens. The step number t counts applied steps from 1; a step skipped
because a number was not finite changes nothing and does not count. With learning rate lr and decay
coefficient wd:

`adamw` (adam.py) updates every row, with g = 0 where a row was not touched, exactly as torch.optim.AdamW
would on a dense gradient; its cost grows with the table.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

`row_adam` (adam.py) applies the same formula to touched rows alone. An untouched row keeps w, m and v
bit for bit: its moments do not fade, it does not decay, and momentum moves it no further. t counts all
steps, those too in which a row was not touched: a row that is first touched late gets
|m| / sqrt(v) = (1 - b1) / sqrt(1 - b2), not the 1 that a count of its own would give.

`row_adagrad` (adagrad.py) keeps one number for each touched row and tile of `column_tile` columns:

    a <- a + mean over the tile's columns of g^2
    w <- (1 - lr wd) w - lr g / (sqrt(a) + eps)

There is no bias to correct and no moment to fade: t does not enter. Statistics never cross a tile and
columns are cut on tiles only, so column shards compute what one shard would. State is D / column_tile
numbers a row, where Adam has 2 D.

**Decay** is decoupled, multiplies the step's learning rate, and under the row optimizers acts when a row
is touched: a row touched in a share f of the steps decays at f times the dense rate.

**Clipping** sees gradients, not updates: the norm of the values' gradient is taken over touched rows (the
others' is zero) after the sum over replicas and stage copies, each shard counted once, before any scaling
by the learning rate. `memory.clip=own` scales the values' gradient alone by
min(1, memory.clip_grad / norm); `joint` scales dense and values' gradients alike by
min(1, optim.clip_grad / sqrt(dense norm^2 + values' norm^2)).

Arithmetic is in float32 (float64 for float64 values), in kernels/row_update for touched rows; rounding.py
there says how it is kept in bf16.
"""

from torch import Tensor

from mempar.dims import TableSlice
from mempar.memory.optimizer.adagrad import TableAdagrad
from mempar.memory.optimizer.adam import TableAdam
from mempar.memory.optimizer.table import OptimizerSettings, TableOptimizer

__all__ = ["OptimizerSettings", "TableAdagrad", "TableAdam", "TableOptimizer", "make_table_optimizer"]


def make_table_optimizer(
    name: str, values: Tensor, part: TableSlice, settings: OptimizerSettings
) -> TableAdam | TableAdagrad:
    """Make the optimizer of one shard.

    Args:
        name: one of `memory.config.OPTIMIZERS`.
        values: `[S_i, D_j]`, changed in place by every update.
        part: where the shard lies in its table.
        settings: coefficients and precision.
    """
    if name == "row_adagrad":
        return TableAdagrad(values, part, settings)
    return TableAdam(values, part, settings, touched_only=name == "row_adam")
