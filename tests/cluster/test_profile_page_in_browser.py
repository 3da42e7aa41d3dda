"""Pages in headless Chromium, without a network: plots are painted, on a desk and on a phone; tables work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import Browser
from made_up_inspection import made_up_inspection
from mempar.recipes import find_recipe
from mempar.tools.inspection.page.document import render_page as render_inspection
from mempar.tools.profile.page.document import render_page
from mempar.tools.study.page.document import render_page as render_study
from page_reader import HOSTILE
from profile_reports import made_up_profile
from study_runs import MICRO, made_up_results

pytestmark = pytest.mark.cluster

# Of a plot's pixels, those that are not its background, and those that have the colours of data.
LEAST_PAINTED, LEAST_DATA = 0.04, 0.001
# Between the strongest and the weakest of red, green and blue, of 255.
LEAST_HUE = 60
# Letters are smoothed: nothing that was painted has but two colours.
LEAST_COLOURS = 50
# CSS pixels of the smallest letters.
LEAST_LETTERS = {1200: 10.0, 390: 7.0}
BOXES = """[...document.querySelectorAll("figure svg")].map((svg) => {
  const box = svg.getBoundingClientRect(), figure = svg.closest("figure");
  const scale = box.width / svg.viewBox.baseVal.width;
  return {name: figure.id, left: box.left, top: box.top, width: box.width, height: box.height, letters: 9 * scale};
})"""


def assert_painted(picture: Path, boxes: list[dict[str, Any]], width: int) -> None:
    """Every plot shows something in its own part of the page."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    for box in boxes:
        left, top = int(box["left"]), int(box["top"])
        part = pixels[top : top + int(box["height"]), left : min(left + int(box["width"]), width)].astype(np.int32)
        colours, counts = np.unique(part @ [1 << 16, 1 << 8, 1], return_counts=True)
        painted = 1 - counts.max() / counts.sum()
        # Ink, grid and background are greys; data are not.
        data = (np.ptp(part, axis=2) > LEAST_HUE).mean()
        print(f"{picture.stem} {box['name']}: {painted:.1%} painted, {data:.1%} data, {len(colours)} colours")
        assert painted > LEAST_PAINTED and data > LEAST_DATA and len(colours) >= LEAST_COLOURS, box
        assert box["letters"] > LEAST_LETTERS[width], box


def test_page_is_painted_and_works(tmp_path: Path) -> None:
    pages = {}
    for name, size in (("many", 16), ("one", 1)):
        report, spans = made_up_profile(size, name=HOSTILE)
        pages[name] = tmp_path / f"{name}.html"
        pages[name].write_text(render_page(report, spans))
    with Browser(tmp_path) as browser:
        for name, plots in (("one", 4), ("many", 9)):
            for width, dark in ((1200, False), (390, True)):
                browser.open(pages[name], width=width, dark=dark)
                # Nothing is cut off at the right: what is wider scrolls by itself.
                assert browser.evaluate("document.documentElement.scrollWidth") == width
                boxes = browser.evaluate(BOXES)
                assert len(boxes) == plots
                assert_painted(browser.screenshot(tmp_path / f"{name}-{width}.png"), boxes, width)
        # What a name holds is shown, and not run.
        assert browser.evaluate("document.querySelector('h1').textContent") == f"Profile of {HOSTILE}"
        check_table(browser)
        assert set(browser.asked_for) == {page.as_uri() for page in pages.values()}
        assert browser.errors == []


def test_page_of_an_inspection_is_painted(tmp_path: Path) -> None:
    path = tmp_path / "inspection.html"
    path.write_text(render_inspection(made_up_inspection(60, HOSTILE), find_recipe("smoke")))
    with Browser(tmp_path) as browser:
        for width, dark in ((1200, False), (390, True)):
            browser.open(path, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            boxes = browser.evaluate(BOXES)
            assert len(boxes) == 10
            assert_painted(browser.screenshot(tmp_path / f"inspection-{width}.png"), boxes, width)
        assert browser.asked_for == [path.as_uri()] * 2 and browser.errors == []


def test_page_of_a_study_is_painted(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_study(made_up_results(), {"size": HOSTILE, "settings": MICRO.to_json()}))
    with Browser(tmp_path) as browser:
        for width, dark in ((1200, False), (390, True)):
            browser.open(path, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            boxes = browser.evaluate(BOXES)
            assert len(boxes) == 7
            assert_painted(browser.screenshot(tmp_path / f"report-{width}.png"), boxes, width)
        assert browser.asked_for == [path.as_uri()] * 2 and browser.errors == []


def check_table(browser: Browser) -> None:
    """Sort, filter, and show more of the sixteen ranks' rows."""

    def column(field: str) -> list[str]:
        return browser.evaluate(
            f"""(() => {{
              const heads = [...document.querySelectorAll("#rows th")];
              const at = heads.findIndex((head) => head.dataset.field === "{field}");
              return [...document.querySelector("#rows tbody").rows].map((row) => row.cells[at].textContent);
            }})()"""
        )

    def enter(words: str) -> None:
        browser.evaluate(f"filter.value = {words!r}; filter.dispatchEvent(new Event('input')); 0")

    def click(what: str) -> None:
        browser.evaluate(f"document.querySelector({what!r}).click()")

    assert len(column("rank")) == 100
    click("#more")
    assert len(column("rank")) == 1100
    enter("rank=3 values step=2")
    # Three layers, values alone: words are met by phase or group.
    assert set(column("rank")) == {"3"} and set(column("phase")) == {"values"} and len(column("layer")) == 3
    click("#rows [data-field=microseconds] button")
    times = [float(text.replace(",", "")) for text in column("microseconds")]
    assert times == sorted(times, reverse=True)
    click("#rows [data-field=microseconds] button")
    assert [float(text.replace(",", "")) for text in column("microseconds")] == sorted(times)
    total = browser.evaluate("document.querySelector('#rows tfoot').rows[0].cells[8].textContent")
    assert abs(float(total.replace(",", "")) - sum(times)) < 0.3
    enter("nothing=like this")
    assert column("rank") == []
    assert browser.evaluate("document.getElementById('shown').textContent") == "0 of 0 rows shown"
