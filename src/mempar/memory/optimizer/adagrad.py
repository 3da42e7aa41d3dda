"""Row-wise Adagrad on a shard: one statistic for each row and tile of columns.

After "Adaptive Subgradient Methods" (Duchi, Hazan, Singer 2011), with the mean over a row's columns in
place of every column's own sum, as embedding tables are trained in recommenders. The package's docstring
has the formula.
"""

from torch import Tensor

from mempar.dims import TableSlice, column_tiles
from mempar.kernels.row_update import Adagrad, update_rows
from mempar.memory.optimizer.table import OptimizerSettings, TableOptimizer


class TableAdagrad(TableOptimizer):
    """Accumulated squares of one shard and their update.

    Attributes:
        state: `accumulator [S_i, tiles of D_j]` in float32 at least, and `master` where bf16 values keep float32
            ones beside them.
    """

    def __init__(self, values: Tensor, part: TableSlice, settings: OptimizerSettings) -> None:
        super().__init__(values, part, settings)
        self._tiles = column_tiles(part, settings.column_tile)
        self.state["accumulator"] = values.new_zeros(part.num_rows, self._tiles.num_columns, dtype=self.wide)

    def place_of(self, name: str) -> TableSlice:
        """See `TableOptimizer.place_of`: the accumulators make up a tensor `[S, tiles of D]`."""
        return self._tiles if name == "accumulator" else self.part

    def rule(self, lr: float) -> Adagrad:
        """What moves rows in a step with this learning rate."""
        settings = self.settings
        return Adagrad(
            accumulator=self.state["accumulator"],
            column_tile=settings.column_tile,
            lr=lr,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def _update(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        update_rows(self.rows, self.rule(lr), rows, grad, step=self.step, backend=self.settings.backend)
