"""Heat maps: a number for each row and column, as shades of one colour."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mempar.tools.page.plot import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Shades that the eye tells apart; what is less than half of the first is left empty.
LEVELS = 8
_COLOUR = "#0072B2"
# CSS pixels: of a row, and of all that is around rows and columns with names.
ROW, AROUND = 15.0, 118.0


def paint_heat(
    axes: "Axes", values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], quantity: str
) -> None:
    """Draw a heat map, with its shades explained above; the darkest is the largest number.

    Cells of one shade are one path, so that a map of thousands of cells is a few paths.

    Args:
        axes: to draw into.
        values: a number from 0 for each row and column.
        rows: their names.
        columns: their names.
        quantity: what the numbers are.
    """
    from matplotlib.patches import PathPatch

    most = max((value for of_row in values for value in of_row), default=0.0) or 1.0
    levels = [[level_of(value / most) for value in of_row] for of_row in values]
    for shade in range(1, LEVELS + 1):
        cells = [
            (row, column) for row, of_row in enumerate(levels) for column, level in enumerate(of_row) if level == shade
        ]
        if cells:
            axes.add_patch(PathPatch(_path(cells), facecolor=_COLOUR, alpha=shade / LEVELS, linewidth=0))
    for shade in (1, LEVELS // 2, LEVELS):
        label = f"{most * shade / LEVELS:.2g}"
        axes.plot([], [], "s", color=_COLOUR, alpha=shade / LEVELS, markersize=9, label=label)
    axes.set_xlim(-0.5, max(1, len(columns)) - 0.5)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    # Letters alone stand upright.
    rotation = 90.0 if max(map(len, columns), default=0) > 1 else 0.0
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=rotation, fontsize=8.0)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2, handlelength=1, title=quantity,
        title_fontsize=9.0, alignment="left",
    )  # fmt: skip


def level_of(value: float) -> int:
    """The shade of a share of the largest number, 0 for none."""
    return min(LEVELS, max(0, round(value * LEVELS)))


def _path(cells: Sequence[tuple[int, int]]) -> Any:
    from matplotlib.path import Path

    vertices: list[tuple[float, float]] = []
    codes: list[Any] = []
    for row, column in cells:
        left, right, top, bottom = column - 0.48, column + 0.48, row - 0.46, row + 0.46
        vertices += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(vertices, codes)
