"""A page as one file: head, plots and sections, under a policy that lets nothing else run or be fetched.

Whatever comes from a file is data: text is escaped (here, and in `tables.py`), rows are JSON in an element that is not
run, and a policy in the page lets its own script run and nothing else, and nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from mempar.tools.page.plot import Plot


def render_document(
    *,
    title: str,
    subtitle: str,
    head: str,
    plots: Sequence[Plot],
    sections: str = "",
    script: str = "",
    style: str = "",
) -> str:
    """Put a page together.

    Args:
        title: as it is; it is escaped here, like the subtitle.
        subtitle: under the title.
        head: markup that follows in the header: figures and tables.
        plots: in the order in which they are shown.
        sections: markup that follows the plots, whole `section` elements.
        script: the one script that may run; none where it is empty.
        style: CSS beside what pages share.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    running = "'none'"
    if script:
        running = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {running}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{page_file("mempar.tools.page", "page.css")}{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{escape(subtitle)}</p>
{head}
</header>
<main>
<section class="plots" aria-label="plots">
{"".join(map(figure, plots))}</section>
{sections}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def figure(plot: Plot) -> str:
    """A plot with its title and note; the title alone where there is nothing to draw."""
    svg = plot.svg
    classes = " ".join(["plot", *(["wide"] if plot.wide else []), *([] if svg else ["empty"])])
    note = f"<p>{escape(plot.note)}</p>" if plot.note and svg else ""
    drawing = f'<div class="scroll">{svg}</div>' if svg else ""
    return (
        f'<figure class="{classes}" id="{plot.name}"><figcaption><h2>{escape(plot.title)}</h2>{note}</figcaption>'
        f"{drawing}</figure>\n"
    )


def embedded_json(name: str, data: Any) -> str:
    """Data for a page's script, in an element that is not run.

    Args:
        name: of the element.
        data: plain JSON.
    """
    # "</script" and "<!--" end or change the element wherever they stand.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def page_file(package: str, name: str) -> str:
    """The text of a file that lies in a package, for its pages."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
