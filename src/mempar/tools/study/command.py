"""`mempar study recall`: make the data, do the runs, draw the page and say what it shows."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.preflight import check_layout
from mempar.tools.study import corpus
from mempar.tools.study.directory import StudyDir, needs_room
from mempar.tools.study.page import write_page
from mempar.tools.study.plan import Study, study_of
from mempar.tools.study.results import Result, gather_results, load_results, save_results
from mempar.tools.study.schedule import Planned, check_ending, run_all
from mempar.tools.study.summary import summarise
from mempar.tools.study.variants import run_of

# What the study needs beside mempar's own, and the extra that brings them.
_PACKAGES = ("fontTools", "matplotlib", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        size: quick, full or large.
        given: settings as `KEY=VALUE`.
        variants: to take part; all unless given.
        slots: of Memory+'s tables; the size's unless given.
        num_seeds: of each model; the size's unless given.
        jobs: runs at a time; one a core unless given, and one on a GPU.
        keep_models: whether checkpoints of runs that are done stay.
        out: the study's directory; runs/recall-SIZE unless given.
    """

    size: str
    given: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    num_seeds: int | None = None
    jobs: int | None = None
    keep_models: bool = False
    out: Path | None = None


def recall(request: Request, say: Callable[[str], None]) -> list[Result]:
    """Do a study, or go on with one, and draw its page.

    Args:
        request: what was asked for.
        say: prints a line.

    Raises:
        ConfigError: for bad input, before anything is started.
        MemparError: when runs failed; the others are done.
    """
    study = study_of(
        request.size,
        variants=request.variants,
        slots=request.slots,
        num_seeds=request.num_seeds,
        given=request.given,
    )
    jobs = _jobs(request.jobs)
    _need_packages()
    paths = StudyDir((request.out or Path("runs") / f"recall-{request.size}").resolve())
    # Before anything is written; the tokenizer may come out smaller.
    plan_runs(study, paths, study.settings.vocab_size)
    paths.check(study.settings)
    gather_results(paths.runs)
    with RunLock(paths.root, say):
        paths.open(request.size, study.settings)
        say(f"{study.settings.facts:,} facts, {_counted(study)}: {paths.root}")
        with needs_room(paths.corpus):
            vocab_size = corpus.build(paths.corpus, study.settings)
            paths.remember(corpus.checksums(paths.corpus))
        planned = plan_runs(study, paths, vocab_size)
        ending = run_all(planned, jobs, keep_models=request.keep_models, say=say)
        results = gather_results(paths.runs)
        if results:
            with needs_room(paths.results):
                save_results(paths.results, results)
            _draw(paths, results, say)
    done = sum(one.is_done for one in planned)
    if ending.stopped and done < len(planned):
        say(f"ended by {ending.stopped} with {done} of {len(planned)} runs done; the same command goes on")
    check_ending(ending)
    return results


def report(directory: Path, say: Callable[[str], None]) -> None:
    """Draw the page of a study again, from results.json and, where it is there, study.json.

    Args:
        directory: that holds them.
        say: prints a line.

    Raises:
        ConfigError: when results are not there or are none, matplotlib is missing, or nothing can be written.
    """
    paths = StudyDir(directory)
    _draw(paths, load_results(paths.results), say)


def _draw(paths: StudyDir, results: list[Result], say: Callable[[str], None]) -> None:
    text = summarise(results)
    try:
        page = write_page(paths, results)
        replace_file(paths.summary, f"{text}\n".encode())
    except OSError as error:
        raise ConfigError(
            f"{paths.root} cannot be written ({error.strerror}); page and plots lie beside the results; make room "
            "there, or copy results.json and study.json to where there is some."
        ) from None
    say(text)
    say(f"drawn in {page}")


def plan_runs(study: Study, paths: StudyDir, vocab_size: int) -> list[Planned]:
    """The runs of a study.

    Args:
        study: the study.
        paths: of its directory.
        vocab_size: tokens of its tokenizer.

    Raises:
        ConfigError: when a model's FLOPs cannot be matched, or its settings do not fit.
    """
    settings, data = study.settings, corpus.data_of(paths.corpus)
    return [
        Planned(
            entrant=entrant,
            run=check_layout(run, 1),
            root=paths.runs / run.name,
            corpus=paths.corpus,
            asked=settings.asked,
            evaluation_interval=settings.evaluation_interval,
        )
        for entrant, seed in study.runs
        for run in [run_of(entrant, settings, seed, data, vocab_size)]
    ]


def _counted(study: Study) -> str:
    models, seeds = len(study.entrants), study.num_seeds
    return f"{models} model{'s' * (models > 1)}, {seeds} seed{'s' * (seeds > 1)} each"


def _jobs(given: int | None) -> int:
    if given is not None and given < 1:
        raise ConfigError(f"--jobs {given} runs nothing; at least one run has to be done at a time; raise it.")
    if given:
        return given
    import torch

    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def _need_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the study needs {', '.join(missing)}, which is not installed; packages for facts, tokens and plots come "
            "with an extra; pip install 'mempar[study]'."
        )
