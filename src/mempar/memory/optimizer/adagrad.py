"""Row-wise Adagrad on a shard: one statistic for each row and tile of columns.

After "Adaptive Subgradient Methods" (Duchi, Hazan, Singer 2011), with the mean over a row's columns in
place of every column's own sum, as embedding tables are trained in recommenders. The package's docstring
has the formula.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.dims import TableSlice, column_tiles
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
        # The last tile of a table may be narrower.
        starts = torch.arange(self._tiles.column_start, self._tiles.column_end, device=values.device)
        self._widths = (part.value_dim - starts * settings.column_tile).clamp(max=settings.column_tile).to(self.wide)
        self.state["accumulator"] = values.new_zeros(part.num_rows, self._tiles.num_columns, dtype=self.wide)

    def place_of(self, name: str) -> TableSlice:
        """See `TableOptimizer.place_of`: the accumulators make up a tensor `[S, tiles of D]`."""
        return self._tiles if name == "accumulator" else self.part

    def _update(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        tile, width = self.settings.column_tile, self.part.num_columns
        for block in self._blocks(len(rows)):
            index, part = rows[block], grad[block]
            squares = F.pad(part.square(), (0, self._tiles.num_columns * tile - width))
            accumulator = self.state["accumulator"].index_select(0, index)
            accumulator += squares.view(len(index), -1, tile).sum(-1).div_(self._widths)
            self.state["accumulator"].index_copy_(0, index, accumulator)
            root = accumulator.sqrt().add_(self.settings.eps)
            weight = self._read(index)
            self._decay(weight, lr)
            weight.addcdiv_(part, root.repeat_interleave(tile, dim=1)[:, :width], value=-lr)
            self._write(index, weight)
