"""The plots of a page as one picture: a PNG on white, with titles, for where a page cannot be opened."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mempar.tools.page.plot import WHOLE, Plot
from mempar.tools.page.svg import INK, MUTED, PIXELS_PER_INCH, own_style

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

# Pixels of the picture a CSS pixel.
_SCALE = 1.5
# Letters of titles and notes in a CSS pixel, and CSS pixels of a line and of what is around a plot.
_TITLE_LETTERS, _NOTE_LETTERS, _LINE, _AROUND = 1 / 7.0, 1 / 5.2, 15.0, 16.0


def draw_picture(title: str, plots: Sequence[Plot]) -> bytes:
    """Draw plots one below the other, two side by side where they are not wide.

    Args:
        title: of all of them.
        plots: those without a drawing have their titles alone.

    Returns:
        A PNG file.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    rows = _rows(plots)
    heights = [max(_height(plot) for plot in row) for row in rows]
    with own_style({"figure.facecolor": "white", "savefig.facecolor": "white"}):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        above = 2 * _LINE + _AROUND
        size = (WHOLE / PIXELS_PER_INCH, (above + sum(heights)) / PIXELS_PER_INCH)
        figure: Figure = Figure(figsize=size, dpi=PIXELS_PER_INCH * _SCALE, layout="constrained")
        # A row of its own: a figure leaves no room for its title where it has subfigures.
        of_rows: Any = figure.subfigures(1 + len(rows), 1, squeeze=False, height_ratios=[above, *heights])
        of_rows[0, 0].text(0.5, 0.5, title, ha="center", va="center", fontsize=13.0, fontweight="bold", color=INK)
        for of_row, row in zip(of_rows[1:, 0], rows, strict=True):
            parts = of_row.subfigures(1, 1 if row[0].wide else 2, squeeze=False)[0]
            for part, plot in zip(parts, row, strict=False):
                _paint(part, plot)
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _rows(plots: Sequence[Plot]) -> list[list[Plot]]:
    rows: list[list[Plot]] = []
    for plot in plots:
        if rows and not plot.wide and len(rows[-1]) == 1 and not rows[-1][0].wide:
            rows[-1].append(plot)
        else:
            rows.append([plot])
    return rows


def _heading(plot: Plot) -> tuple[list[str], list[str]]:
    """Lines of its title and of its note."""
    width = WHOLE if plot.wide else WHOLE / 2
    note = plot.note if plot.paint is not None else ""
    return textwrap.wrap(plot.title, int(width * _TITLE_LETTERS)), textwrap.wrap(note, int(width * _NOTE_LETTERS))


def _height(plot: Plot) -> float:
    return plot.height + _LINE * sum(map(len, _heading(plot))) + _AROUND


def _paint(part: "SubFigure", plot: Plot) -> None:
    title, note = _heading(plot)
    left: Any = {"x": 0.01, "ha": "left"}
    if plot.paint is None:
        part.suptitle("\n".join(title), fontsize=10.5, color=MUTED, **left)
        return
    plot.paint(part.subplots())
    part.suptitle("\n".join(title), fontsize=10.5, fontweight="bold", color=INK, **left)
    part.supxlabel("\n".join(note), fontsize=8.5, color=MUTED, **left)
