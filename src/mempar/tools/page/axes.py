"""What plots share: colours and markers of series, names beside bars, legends above."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mempar.tools.page.plot import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour and marker of a series; the two tell it apart. Colours are those of Okabe and Ito.
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))


def series(number: int) -> list[tuple[str, str]]:
    """Colours and markers of so many series; of more than there are, the first come again."""
    return [SERIES[place % len(SERIES)] for place in range(number)]


def name_bars(axes: "Axes", names: Sequence[str], quantity: str) -> None:
    """Name horizontal bars from the top, at their left."""
    name_rows(axes, names, quantity)
    axes.set_xlim(0, 1.03 * axes.get_xlim()[1])
    axes.grid(visible=False, axis="y")


def name_rows(axes: "Axes", names: Sequence[str], quantity: str) -> None:
    """Name rows from the top, at their left."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(quantity)


def legend_above(axes: "Axes", columns: int, *, narrow: bool = False) -> None:
    """Put the legend above the plot, where it hides nothing.

    Args:
        axes: with labelled series.
        columns: of the legend.
        narrow: whether names stand close together.
    """
    spacing = {"columnspacing": 1, "handlelength": 1} if narrow else {}
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2, **spacing)
