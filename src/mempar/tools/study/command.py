"""`mempar study recall`: make the data, do the runs, draw the page and say what it shows."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.data.manifest import read_manifest
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.preflight import check_layout
from mempar.tools.study import corpus
from mempar.tools.study.directory import StudyDir
from mempar.tools.study.page import write_page
from mempar.tools.study.plan import Study, study_of
from mempar.tools.study.results import Result, gather_results, save_results
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
        num_seeds: of each model; the size's unless given.
        jobs: runs at a time; one a core unless given, and one on a GPU.
        keep_models: whether checkpoints of runs that are done stay.
        out: the study's directory; runs/recall-SIZE unless given.
    """

    size: str
    given: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
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
    study = study_of(request.size, variants=request.variants, num_seeds=request.num_seeds, given=request.given)
    jobs = _jobs(request.jobs)
    _need_packages()
    paths = StudyDir((request.out or Path("runs") / f"recall-{request.size}").resolve())
    with RunLock(paths.root, say):
        paths.open(request.size, study.settings)
        say(f"{study.settings.facts:,} facts, {len(study.entrants)} models, {study.num_seeds} seeds each: {paths.root}")
        corpus.build(paths.corpus, study.settings)
        planned = plan_runs(study, paths)
        ending = run_all(planned, jobs, keep_models=request.keep_models, say=say)
        results = gather_results(paths.runs)
        if results:
            replace_file(paths.results, save_results(results))
            text = summarise(results)
            replace_file(paths.summary, f"{text}\n".encode())
            say(text)
            say(f"drawn in {write_page(paths.root)}")
    if ending.stopped:
        say(f"ended by {ending.stopped} with {len(results)} of {len(planned)} runs done; the same command goes on")
    check_ending(ending)
    return results


def plan_runs(study: Study, paths: StudyDir) -> list[Planned]:
    """The runs of a study whose corpus is there.

    Raises:
        ConfigError: when a model's FLOPs cannot be matched, or its settings do not fit.
    """
    manifest = read_manifest(paths.corpus / corpus.TRAIN)
    assert manifest is not None
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
        for run in [run_of(entrant, settings, seed, data, manifest.vocab_size)]
    ]


def _jobs(given: int | None) -> int:
    if given is not None and given < 1:
        raise ConfigError(f"--jobs {given} runs nothing; at least one run has to be done at a time; raise it.")
    return given or len(os.sched_getaffinity(0))


def _need_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the study needs {', '.join(missing)}, which is not installed; packages for facts, tokens and plots come "
            "with an extra; pip install 'mempar[study]'."
        )
