"""The page of a study: a paragraph, plots, the models in a table, and the settings."""

from html import escape
from pathlib import Path
from typing import Any

from mempar.runtime.durable import replace_file
from mempar.tools.page.document import render_document
from mempar.tools.page.picture import draw_picture
from mempar.tools.page.svg import need_matplotlib
from mempar.tools.page.tables import data_table, pairs_table, tiles
from mempar.tools.study.directory import StudyDir, read_json
from mempar.tools.study.page.plots import all_plots
from mempar.tools.study.results import Result, Results, load_results
from mempar.tools.study.summary import summarise, title
from mempar.tools.study.variants import DENSE, Entrant

_TITLE = "Does memory pay? Recall of facts at equal compute"
_HEADS = (
    "model",
    "parameters",
    "in tables",
    "MFLOP a token",
    "of dense",
    "recalled",
    "answer loss",
    "training loss",
    "slots read",
    "seconds",
    "seeds",
)


def write_page(directory: Path) -> Path:
    """Draw the page of a study and its picture, from the results and the description that lie in its directory.

    Returns:
        The page, beside them.

    Raises:
        ConfigError: when matplotlib is missing, or the results are not there, damaged or impossible.
    """
    paths = StudyDir(directory)
    need_matplotlib(paths.page.name, "then `python -m mempar.tools.study.page DIR` draws the page of a study")
    results, description = load_results(paths.results), read_json(paths.description)
    replace_file(paths.page, render_page(results, description).encode())
    replace_file(paths.picture, draw_picture(_TITLE, all_plots(Results(results))))
    return paths.page


def render_page(results: list[Result], description: Any) -> str:
    """Put the page together.

    Args:
        results: of the study, at least one.
        description: content of study.json.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    found = Results(results)
    given = description if isinstance(description, dict) else {}
    facts = _pairs(given.get("settings"))
    return render_document(
        title=_TITLE,
        subtitle=f"{given.get('size', '')} study, {len(results)} runs of {len(found.entrants)} models",
        head=f"{_tiles(found)}<p>{escape(summarise(results))}</p>",
        plots=all_plots(found),
        sections=_section("Models", models_table(found))
        + _section("Settings", pairs_table([*_pairs(given.get("sources")), *facts], "Settings")),
    )


def models_table(found: Results) -> str:
    """A row for each model: sizes, FLOPs, and what its runs came to."""
    dense = found.runs(Entrant(variant=DENSE))
    rows = []
    for entrant in found.entrants:
        one = found.runs(entrant)[0]
        covered = [run.coverage for run in found.runs(entrant) if run.coverage is not None]
        rows.append(
            (
                title(entrant),
                f"{one.params:,}",
                f"{one.table_params:,}" if one.table_params else "–",  # noqa: RUF001
                f"{one.flops_per_token / 1e6:.3f}",
                f"{one.flops_per_token / dense[0].flops_per_token:.3f}" if dense else "–",  # noqa: RUF001
                str(found.mean(entrant, lambda run: run.accuracy)),
                str(found.mean(entrant, lambda run: run.answer_loss)),
                str(found.mean(entrant, lambda run: run.loss)),
                f"{sum(covered) / len(covered):.1%}" if covered else "–",  # noqa: RUF001
                f"{found.mean(entrant, lambda run: run.seconds).value:,.0f}",
                str(len(found.runs(entrant))),
            )
        )
    return data_table(_HEADS, rows, "Models", numbers=range(1, len(_HEADS)))


def _tiles(found: Results) -> str:
    return tiles(
        [(f"{found.mean(entrant, lambda run: run.accuracy).value:.1%}", title(entrant)) for entrant in _best(found)]
    )


def _best(found: Results) -> list[Entrant]:
    """Of every variant the model that recalls most."""
    best: dict[str, Entrant] = {}
    for entrant in found.entrants:
        so_far = best.get(entrant.variant)
        if so_far is None or _accuracy(found, entrant) > _accuracy(found, so_far):
            best[entrant.variant] = entrant
    return list(best.values())


def _accuracy(found: Results, entrant: Entrant) -> float:
    return found.mean(entrant, lambda run: run.accuracy).value


def _section(name: str, content: str) -> str:
    return f'<section aria-label="{name.lower()}"><h2>{name}</h2>{content}</section>\n'


def _pairs(found: Any) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in found.items()] if isinstance(found, dict) else []
