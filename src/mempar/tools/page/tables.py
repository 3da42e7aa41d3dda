"""Figures and tables of a page. Everything that comes from a file is escaped."""

from collections.abc import Collection, Iterator, Sequence
from html import escape
from typing import Any


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """The few figures that are asked for first.

    Args:
        figures: each with what it is.
    """
    found = "".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(what)}</span></div>" for value, what in figures
    )
    return f'<div class="figures">{found}</div>'


def pairs_table(pairs: Sequence[tuple[str, str]], caption: str) -> str:
    """A table of facts by name.

    Args:
        pairs: name and value.
        caption: for those who do not see the page.
    """
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in pairs)
    head = f"<caption>{escape(caption)}</caption>"
    return f'<div class="scroll"><table class="settings">{head}<tbody>{rows}</tbody></table></div>'


def settings_folded(config: dict[str, Any]) -> str:
    """Every setting of a run, folded.

    Args:
        config: the run as config.yaml has it.
    """
    every = list(_flat(config, ""))
    summary = f"<summary>All {len(every)} settings of the run</summary>"
    return f"<details>{summary}{pairs_table(every, 'Settings')}</details>"


def data_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numbers: Collection[int] = ()
) -> str:
    """A table of rows.

    Args:
        heads: of the columns.
        rows: a text for each column.
        caption: for those who do not see the page.
        numbers: columns that are aligned at the right.
    """
    kinds = [' class="number"' if place in numbers else "" for place in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="data"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Settings with their dotted names, as the command line takes them."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)
