"""Inline SVG from matplotlib: without its global state, without references to anything outside.

Text is drawn as outlines, so that it looks alike everywhere and needs no font. Ink, grid and surface are the page's own
colours, light or dark: matplotlib is given the light ones, which are then replaced by names of CSS variables.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mempar.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of page.css, where it is light; the surface is not quite white, which data may be.
INK, MUTED, GRID, SURFACE = "#1b1f24", "#5c6670", "#d9dde2", "#fefefe"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}
PIXELS_PER_INCH = 72.0
_STYLE: Any = {
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    # Names from files are no formulas.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10.0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
# What matplotlib would write about itself, with addresses.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw(name: str, width: float, height: float, paint: "Callable[[Axes], None]") -> str:
    """Draw one plot.

    Args:
        name: of the plot; elements that refer to each other have names that begin with it, so that several plots
            may stand in one page.
        width: in CSS pixels.
        height: in CSS pixels.
        paint: draws into the axes.

    Returns:
        An `svg` element.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    with own_style({"svg.hashsalt": name}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
        figure: Figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
        paint(figure.subplots())
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata=_NO_METADATA)
    return _inline(text.getvalue(), name, width, height)


@contextmanager
def own_style(more: Mapping[str, Any]) -> Iterator[None]:
    """Let matplotlib draw in the style of pages, and in nobody's own, for a while.

    Args:
        more: settings of matplotlib beside those of pages.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    matplotlib = need_matplotlib("a plot")
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name may have letters that the font lacks: boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Nobody's own style, except where plots go by default.
        matplotlib.rcParams.update(
            {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
        )
        matplotlib.rcParams.update(_STYLE | dict(more))
        yield


def need_matplotlib(what: str, then: str = "") -> Any:
    """Import matplotlib.

    Args:
        what: is not written without it, for the message.
        then: what to do when it is installed; a clause that follows a comma.

    Raises:
        ConfigError: when it is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            f"{what} is not written: matplotlib is not installed here; plots are drawn by matplotlib, which is the "
            f"extra `report`; run `pip install 'mempar[report]'`{f', {then}' if then else ''}."
        ) from None
    return matplotlib


def _inline(text: str, name: str, width: float, height: float) -> str:
    """Cut the element out of a file of its own: no declarations, no addresses, names of the plot's own."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    _, _, body = body.partition(">")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">{body.strip()}'
