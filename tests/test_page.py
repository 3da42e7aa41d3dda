"""mempar.tools.page: what pages have in common: plots, tables, one file, one picture."""

import io
import json
import math
import re
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mempar.errors import ConfigError
from mempar.tools.page.axes import SERIES, legend_above, name_bars, series
from mempar.tools.page.bins import by_powers, powers, range_label
from mempar.tools.page.document import embedded_json, render_document
from mempar.tools.page.heat import LEVELS, level_of, paint_heat
from mempar.tools.page.picture import draw_picture
from mempar.tools.page.plot import LONGEST_NAME, Plot, byte_count, milliseconds, share, short
from mempar.tools.page.svg import INK, draw
from mempar.tools.page.tables import data_table, pairs_table, settings_folded, tiles
from page_reader import HOSTILE, read_page


def paint(axes: Any) -> None:
    for colour, marker in series(2):
        axes.plot([0, 1], [0, math.pi], marker=marker, color=colour, label="$a$ <b>")
    legend_above(axes, 2)


def plot(name: str, **more: Any) -> Plot:
    return Plot(
        **{"name": name, "title": f"Title of {name}", "note": "A note.", "paint": paint, "height": 120.0, **more}
    )


def render(**more: Any) -> str:
    given: dict[str, Any] = {"title": "A page", "subtitle": "of a test", "head": "", "plots": [plot("one")]}
    return render_document(**{**given, **more})


def test_plot_is_an_element_of_its_own() -> None:
    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, math.pi], marker="o", label="$a$ <b>")
        axes.legend()

    svg = draw("name", 200.0, 100.0, paint)
    assert svg.startswith('<svg viewBox="0 0 200 100"') and svg.endswith("</svg>")
    assert all(name.startswith("name-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert "var(--ink)" in svg and INK not in svg and "<b>" not in svg


def test_figures_of_titles_have_units() -> None:
    assert [milliseconds(us) for us in (0.25, 12.0, 4500.0, 3e6)] == ["0.25 µs", "12 µs", "4.5 ms", "3 s"]
    assert [byte_count(number) for number in (12, 1500, 2.5e6, 7e9)] == ["12 bytes", "1.5 kB", "2.5 MB", "7 GB"]
    assert [share(part) for part in (0.0, 0.012, 0.5)] == ["0%", "1.2%", "50%"]
    assert len(short("x" * 99)) == 28 and short("a\nb") == "a?b"


def test_names_that_are_cut_keep_their_quotes() -> None:
    assert short("a name") == "a name" and short("x" * 99) == "x" * (LONGEST_NAME - 1) + "…"
    quoted = short('"' + "x" * 99 + '"')
    assert quoted.startswith('"x') and quoted.endswith('x…"') and len(quoted) == LONGEST_NAME


def test_page_has_its_parts_and_one_script() -> None:
    bars = plot(
        "bars", paint=lambda axes: (axes.barh([0, 1], [1, 2]), name_bars(axes, ["a", "b"], "metres")), wide=True
    )
    empty = plot("empty", paint=None)
    page = read_page(
        render(
            head=tiles([("1", "figure")])
            + pairs_table([("a", "1")], "Facts")
            + settings_folded({"a": {"b": [1, None]}}),
            plots=[plot("one"), bars, empty],
            sections=f"<section><h2>Rows</h2>{embedded_json('data', {'a': 1})}</section>",
            script="0;",
        )
    )
    assert page.drawn == {"one", "bars"} and list(page.titles) == ["one", "bars", "empty"]
    assert json.loads(page.texts["script"][0]) == {"a": 1} and page.texts["script"][1] == "0;"
    assert "a.b" in page.texts["th"] and "[1, null]" in page.texts["td"]
    # No note where there is no drawing.
    assert page.texts["p"].count("A note.") == 2
    assert not read_page(render()).texts.get("script")


def test_nothing_that_is_given_becomes_markup() -> None:
    text = render(
        title=HOSTILE,
        subtitle=HOSTILE,
        head=tiles([(HOSTILE, HOSTILE)])
        + pairs_table([(HOSTILE, HOSTILE)], HOSTILE)
        + settings_folded({HOSTILE: HOSTILE})
        + data_table([HOSTILE, "n"], [[HOSTILE, "1"]], HOSTILE, numbers={1}),
        plots=[plot("one", title=HOSTILE, note=HOSTILE)],
        sections=f"<section>{embedded_json('data', HOSTILE)}</section>",
    )
    page = read_page(text)
    assert "<script>alert" not in text and json.loads(page.texts["script"][0]) == HOSTILE
    assert [found.get("class") for tag, found in page.elements if tag == "td"][-2:] == [None, "number"]
    assert page.titles["one"] == HOSTILE == page.texts["h1"][0]


def test_picture_has_all_plots_on_white() -> None:
    before = dict(matplotlib.rcParams)
    plots = [plot("one"), plot("two", height=200.0), plot("three", wide=True), plot("four", paint=None), plot("five")]
    picture = draw_picture("A picture", plots)
    assert dict(matplotlib.rcParams) == before
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    assert (pixels[0] == 255).all() and pixels.shape[1] == 1350
    colour = series(2)[1][0]
    data = np.argwhere((pixels == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=2))
    # Three rows of drawings, in the first of them two, and one beside a title alone in the last.
    rows = np.split(data, np.flatnonzero(np.diff(data[:, 0]) > 60) + 1)
    assert len(rows) == 3
    assert np.ptp(rows[0][:, 1]) > 700 and np.ptp(rows[1][:, 1]) > 700 and rows[2][:, 1].min() > 675


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for make in (render, lambda: draw_picture("", [plot("one")])):
        with pytest.raises(ConfigError, match=r"matplotlib is not installed .* `pip install 'mempar\[report\]'`\."):
            make()


def test_series_come_again() -> None:
    assert series(len(SERIES) + 1)[-1] == SERIES[0] and len({colour for colour, _ in SERIES}) == len(SERIES)


def test_heat_maps_are_a_few_paths_of_shades() -> None:
    values = [[row * column / 30 for column in range(40)] for row in range(20)]
    rows, columns = [f"row {row}" for row in range(20)], [f"{column}" for column in range(40)]
    svg = draw("map", 600.0, 300.0, lambda axes: paint_heat(axes, values, rows, columns, "share"))
    # The darkest is the largest number, which the legend has.
    shades = {float(found) for found in re.findall(r"(?<!stroke-)opacity: ([\d.]+)", svg)}
    assert shades >= {shade / LEVELS for shade in range(1, LEVELS)}
    assert svg.count("<path") < 250 and len(svg) < 250_000
    assert [level_of(part) for part in (0.0, 0.4 / LEVELS, 0.6 / LEVELS, 1.0)] == [0, 0, 1, LEVELS]
    assert draw("empty", 200.0, 100.0, lambda axes: paint_heat(axes, [[0.0]], ["a"], ["b"], "share"))


def test_bins_are_powers_of_two() -> None:
    assert powers(9) == [0, 1, 2, 4, 8] and powers(0) == [0, 1]
    assert by_powers([(0, 5), (1, 1), (2, 2), (3, 4), (1000, 1)]) == {0: 5, 1: 1, 2: 6, 512: 1}
    assert [range_label(low) for low in (0, 1, 2, 512, 1024, 1 << 20)] == ["0", "1", "2–3", "512–1023", "1k+", "1M+"]  # noqa: RUF001
