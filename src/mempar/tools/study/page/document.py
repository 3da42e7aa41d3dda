"""The page of a study: a paragraph, plots, what came of each model and how it was built, and the settings."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from mempar.runtime.durable import replace_file
from mempar.tools.page.document import render_document
from mempar.tools.page.picture import draw_picture
from mempar.tools.page.svg import need_matplotlib
from mempar.tools.page.tables import data_table, pairs_table, tiles
from mempar.tools.study.comparison import Results
from mempar.tools.study.directory import StudyDir, read_json
from mempar.tools.study.page.plots import all_plots, one_of_each
from mempar.tools.study.results import Result
from mempar.tools.study.summary import summarise, title
from mempar.tools.study.variants import DENSE, Entrant

_TITLE = "Does memory pay? Recall of facts at equal compute"
_RESULTS = (
    "model",
    "recalled",
    "nats a token of answers",
    "training loss",
    "slots read lately",
    "ever read",
    "processor seconds",
    "seconds",
    "seeds",
)
_MODELS = (
    "model",
    "parameters",
    "in tables",
    "MFLOP a token",
    "of dense",
    "FFN width",
    "experts",
    "tables x slots",
    "in blocks",
    "rate",
    "of values",
)
# Names of models stay in one line: tables scroll.
_STYLE = ".data td:first-child { white-space: nowrap; }"
_NONE = "–"  # noqa: RUF001


def write_page(paths: StudyDir, results: list[Result]) -> Path:
    """Draw the page of a study and its picture.

    Args:
        paths: of the study; the table of settings needs its description, which may be missing.
        results: at least one.

    Returns:
        The page.

    Raises:
        ConfigError: when matplotlib is missing, or the description is damaged.
        OSError: when they cannot be written.
    """
    need_matplotlib(paths.page.name, f"then `mempar study recall --report {paths.root}` draws it")
    description = read_json(paths.description) if paths.description.exists() else None
    page, picture = render_page(results, description), draw_picture(_TITLE, all_plots(Results(results)))
    replace_file(paths.page, page.encode())
    replace_file(paths.picture, picture)
    return paths.page


def render_page(results: list[Result], description: Any) -> str:
    """Put the page together.

    Args:
        results: of the study, at least one.
        description: content of study.json; None without it.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    found = Results(results)
    given = description if isinstance(description, dict) else {}
    settings = [*_pairs(given.get("sources")), *_pairs(given.get("settings"))]
    size = f"{given['size']} study" if given.get("size") else "study"
    sections = _section("Results", "Means over seeds, and standard deviations.", results_table(found))
    sections += _section(
        "Models", "What differs between them. Rates are those of learning at their peak.", models_table(found)
    )
    if settings:
        sections += _section("Settings", "What all models share.", pairs_table(settings, "Settings"))
    return render_document(
        title=_TITLE,
        subtitle=f"{size}: {_counted(len(results), 'run')} of {_counted(len(found.entrants), 'model')}",
        head=f"{_tiles(found)}<p>{escape(summarise(results))}</p>",
        plots=all_plots(found),
        sections=sections,
        style=_STYLE,
    )


def results_table(found: Results) -> str:
    """A row for each model: what its runs came to."""
    rows = [
        (
            title(entrant, found),
            str(found.recall(entrant)),
            str(found.mean(entrant, lambda run: run.answer_loss)),
            str(found.mean(entrant, lambda run: run.loss)),
            _share(found, entrant, lambda run: run.coverage),
            _share(found, entrant, lambda run: run.coverage_ever),
            f"{found.mean(entrant, lambda run: run.cpu_seconds).value:,.0f}",
            f"{found.mean(entrant, lambda run: run.seconds).value:,.0f}",
            ", ".join(str(run.seed) for run in found.runs(entrant)),
        )
        for entrant in found.entrants
    ]
    return data_table(_RESULTS, rows, "Results", numbers=range(1, len(_RESULTS)))


def models_table(found: Results) -> str:
    """A row for each model: how it is built and trained."""
    dense = found.runs(Entrant(variant=DENSE))
    rows = []
    for entrant in found.entrants:
        one, model = found.runs(entrant)[0], found.runs(entrant)[0].model
        rows.append(
            (
                title(entrant, found),
                f"{one.params:,}",
                f"{one.table_params:,}" if one.table_params else _NONE,
                f"{one.flops_per_token / 1e6:.3f}",
                f"{one.flops_per_token / dense[0].flops_per_token:.3f}" if dense else _NONE,
                f"{model.ffn_hidden_size:,}",
                f"{model.experts}, {model.experts_of_a_token} a token" if model.experts else _NONE,
                f"{model.tables} x {model.table_slots:,}" if model.tables else _NONE,
                ", ".join(map(str, model.memory_layers)) or _NONE,
                f"{model.lr:g}",
                _NONE if model.values_lr is None else f"{model.values_lr:g}",
            )
        )
    return data_table(_MODELS, rows, "Models", numbers=range(1, len(_MODELS)))


def _share(found: Results, entrant: Entrant, figure: Callable[[Result], float | None]) -> str:
    """The mean of a share that not all models have."""
    shares = [share for run in found.runs(entrant) if (share := figure(run)) is not None]
    return f"{sum(shares) / len(shares):.1%}" if shares else _NONE


def _tiles(found: Results) -> str:
    return tiles([(f"{found.recall(entrant).value:.1%}", title(entrant, found)) for entrant in one_of_each(found)])


def _section(name: str, note: str, content: str) -> str:
    return f'<section aria-label="{name.lower()}"><h2>{name}</h2><p>{escape(note)}</p>{content}</section>\n'


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _pairs(found: Any) -> list[tuple[str, str]]:
    """Settings as the command line takes them."""
    if not isinstance(found, dict):
        return []
    return [(str(name), value if isinstance(value, str) else json.dumps(value)) for name, value in found.items()]
