"""What a page shows of one question: a title that answers it, a note on how to read it, and the drawing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mempar.tools.page.svg import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# CSS pixels at which letters have their size: two plots stand side by side on a wide screen, a little enlarged, and one
# on a phone, a little smaller.
HALF, WHOLE = 420.0, 900.0
LONGEST_NAME = 28


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot.

    Attributes:
        name: for the page's elements.
        title: what is seen.
        note: how it was counted; may be empty.
        paint: draws into the axes; None where there is nothing to draw, which the title then says.
        height: in CSS pixels.
        wide: whether it takes the whole width.
    """

    name: str
    title: str
    note: str = ""
    paint: "Callable[[Axes], None] | None" = None
    height: float = 0.0
    wide: bool = False

    @property
    def width(self) -> float:
        """In CSS pixels."""
        return WHOLE if self.wide else HALF

    @property
    def svg(self) -> str:
        """The drawing as an `svg` element, made anew; empty where there is nothing to draw."""
        return "" if self.paint is None else draw(self.name, self.width, self.height, self.paint)


def short(name: str) -> str:
    """A name that fits beside an axis."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(name) <= LONGEST_NAME:
        return name
    end = '…"' if name[0] == name[-1] == '"' else "…"
    return name[: LONGEST_NAME - len(end)] + end


def milliseconds(microseconds: float) -> str:
    """A time for titles, in the unit that suits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3g} s"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:.3g} ms"
    return f"{microseconds:.3g} µs"


def byte_count(num_bytes: float) -> str:
    """Bytes for titles, in the unit that suits them; 1 kB is 1000 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} bytes"


def share(part: float) -> str:
    """A share as percent."""
    return f"{part:.0%}" if part == 0 or part >= 0.1 else f"{part:.1%}"
