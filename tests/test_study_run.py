"""mempar.tools.study.one_run, clock and command: runs that train, are asked, are interrupted; a study, end to end."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import refusal, said_as
from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch.heartbeat import Heartbeat
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.metrics import read_rows
from mempar.runtime.run_dir import RunDir, open_new
from mempar.runtime.step import Stepper
from mempar.tools.study import command, corpus, plan
from mempar.tools.study.command import Request, plan_runs, recall
from mempar.tools.study.directory import StudyDir
from mempar.tools.study.examination import Examination
from mempar.tools.study.one_run import CURVE, ENTRANT, RESULT, TIMES, train_and_examine
from mempar.tools.study.plan import Study
from mempar.tools.study.results import load_results, result_of
from mempar.tools.study.schedule import Planned
from page_reader import read_page
from rank_pool import RankPool
from study_runs import MICRO

pytestmark = pytest.mark.usefixtures("one_thread")
# A size at which three experts have as many parameters as the others.
STUDY = Study(settings=MICRO, slots=(196,), matched_slots=196, num_seeds=1)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> StudyDir:
    """A micro study whose data are there."""
    found = StudyDir(tmp_path_factory.mktemp("study"))
    found.open("quick", MICRO)
    assert corpus.build(found.corpus, MICRO) == MICRO.vocab_size
    return found


def run_to(root: str, stop_after: int = 0) -> str:
    """Do a run on this rank of the pool, or its beginning; returns why it was stopped."""
    stopping = Stopping()
    after_step = Examination.after_step

    def then_stop(self: Examination, report: Any) -> None:
        after_step(self, report)
        if self.trainer.progress.step == stop_after:
            stopping.wish("SIGTERM")

    Examination.after_step = then_stop
    try:
        train_and_examine(RunDir(Path(root)), stopping, Heartbeat())
    finally:
        Examination.after_step = after_step
    return stopping.agreed


def run_with_losses_of_nan(root: str, steps: tuple[int, ...], stop_after: int = 0) -> str:
    """Do a run of which some steps come to nothing; returns why it was stopped or what it failed of."""
    inner, saved = Stepper._schedule, RunDir(Path(root)).latest_checkpoint()
    step = int(saved.name.removeprefix("step_")) if saved else 0

    def spoil(self: Stepper, batches: list[Any], *, forward_only: bool) -> Any:
        nonlocal step
        total, tokens = inner(self, batches, forward_only=forward_only)
        step += 1
        return (total * math.nan if step in steps else total), tokens

    Stepper._schedule = spoil
    try:
        return run_to(root, stop_after)
    except MemparError as error:
        return str(error)
    finally:
        Stepper._schedule = inner


def begin(one: Planned, root: Path, interval: int = 2) -> Path:
    """The directory of a run that has not begun."""
    open_new(root, one.run)
    entrant = {"variant": one.entrant.variant, "slots": one.entrant.slots, "corpus": str(one.corpus)}
    (root / ENTRANT).write_text(json.dumps({**entrant, "asked": one.asked, "evaluation_interval": interval}))
    return root


def rows(root: Path) -> list[dict[str, Any]]:
    """Rows of the curve without the time that they took."""
    found = [json.loads(line) for line in (root / CURVE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in found]


@pytest.mark.parametrize("variant", plan.VARIANTS)
def test_every_model_trains_and_is_asked(variant: str, pool: RankPool, paths: StudyDir, tmp_path: Path) -> None:
    (one,) = plan_runs(dataclasses.replace(STUDY, variants=(variant,)), paths, MICRO.vocab_size)
    root = begin(one, tmp_path / "run")
    assert pool.run(1, run_to, str(root)) == [""]
    result = result_of(json.loads((root / RESULT).read_text()), root / RESULT)
    assert (result.variant, result.slots) == (variant, one.entrant.slots) and result.steps == MICRO.steps
    assert result.tokens == MICRO.tokens and result.device == "cpu"
    assert 0 < result.curve[0].cpu_seconds < result.curve[-1].cpu_seconds == result.cpu_seconds
    model, run = result.model, one.run
    lr = MICRO.lr_of.get(variant, MICRO.lr)
    assert (model.lr, model.values_lr is not None) == (lr, bool(model.tables)) and model.ffn_hidden_size > 0
    assert model.table_slots * model.tables * run.model.hidden_size == result.table_params
    assert model.experts == run.moe.num_experts and model.memory_layers == list(run.memory.layers)
    assert [point.step for point in result.curve] == [2, 4, 6] and result.curve[-1].accuracy == result.accuracy
    assert result.curve[-1].loss < result.curve[0].loss
    assert (result.coverage is not None) == (variant in ("memory", "memory_plus", "peer")) == (result.table_params > 0)


def test_run_that_was_stopped_goes_on_bit_for_bit(pool: RankPool, paths: StudyDir, tmp_path: Path) -> None:
    (one,) = plan_runs(dataclasses.replace(STUDY, variants=("memory_plus",)), paths, MICRO.vocab_size)
    whole, parts = (begin(one, tmp_path / name, 3) for name in ("whole", "parts"))
    pool.run(1, run_to, str(whole))
    assert pool.run(1, run_to, str(parts), 3) == ["SIGTERM"]
    assert not (parts / RESULT).exists() and [row["step"] for row in rows(parts)] == [3]
    # What the step after the row took is not forgotten.
    first = read_rows(parts / TIMES)
    assert [row["step"] for row in first] == [1, 2, 3, 4]
    # As if it had been killed after a row behind its checkpoint.
    with (parts / CURVE).open("a") as file:
        file.write(json.dumps({"step": 5, "seconds": 1.0}) + '\n{"step": 6,')
    assert pool.run(1, run_to, str(parts)) == [""]
    assert rows(parts) == rows(whole)
    times = read_rows(parts / TIMES)
    assert times[:4] == first and [row["step"] for row in times] == [1, 2, 3, 4, 5, 6]
    # And once more, as if it had been killed before its result was written.
    before = json.loads((parts / RESULT).read_text())
    (parts / RESULT).unlink()
    pool.run(1, run_to, str(parts))
    after = json.loads((parts / RESULT).read_text())
    assert before == after and after["cpu_seconds"] == pytest.approx(sum(row["cpu_seconds"] for row in times))


def test_losses_that_are_not_finite_are_left_out_alike(pool: RankPool, paths: StudyDir, tmp_path: Path) -> None:
    (one,) = plan_runs(dataclasses.replace(STUDY, variants=("dense",)), paths, MICRO.vocab_size)
    whole, parts, ruined = (begin(one, tmp_path / name, 3) for name in ("whole", "parts", "ruined"))
    assert pool.run(1, run_with_losses_of_nan, str(whole), (2, 4)) == [""]
    assert pool.run(1, run_with_losses_of_nan, str(parts), (2, 4), 4) == ["SIGTERM"]
    assert pool.run(1, run_with_losses_of_nan, str(parts), (2, 4)) == [""]
    assert rows(parts) == rows(whole)
    results = [json.loads((root / RESULT).read_text(), parse_constant=pytest.fail) for root in (whole, parts)]
    assert [result["skipped"] for result in results] == [2, 2]
    losses = [row["loss"] for row in read_rows(whole / "metrics.jsonl") if row["step"] in (1, 3)]
    assert results[0]["curve"][0]["loss"] == pytest.approx(sum(losses) / 2)
    # An interval without any leaves no result.
    (failure,) = pool.run(1, run_with_losses_of_nan, str(ruined), (4, 5, 6))
    assert "dense-seed1 has come to nothing: at step 6 the loss of every step since" in failure
    assert not (ruined / RESULT).exists() and [row["step"] for row in rows(ruined)] == [3]


def test_study_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(plan.STUDIES, "quick", STUDY)
    said: list[str] = []
    request = Request(size="quick", variants=("dense", "memory_plus"), jobs=2, out=tmp_path / "study")
    results = recall(request, said.append)
    assert [result.variant for result in results] == ["dense", "memory_plus"]
    paths = StudyDir(tmp_path / "study")
    assert load_results(paths.results) == results
    page = read_page(paths.page.read_text())
    assert "accuracy-by-slots" in page.drawn and paths.picture.exists()
    assert paths.summary.read_text().startswith("After 6 steps") and any(
        line.startswith("After 6 steps") for line in said
    )
    # A result that was damaged is told of before anything is run.
    damaged = paths.runs / "dense-seed1" / RESULT
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    with pytest.raises(ConfigError, match=r"dense-seed1/result\.json cannot be read"):
        recall(request, said.append)
    damaged.write_bytes(whole)
    # So is another corpus than the one that runs have read.
    remembered = paths.checksums.read_bytes()
    paths.checksums.write_text("{}")
    with pytest.raises(ConfigError, match=r"is not the corpus that the runs of this study have begun with"):
        recall(request, said.append)
    paths.checksums.write_bytes(remembered)
    # And a place that cannot be written is one message.
    for name in ("results.json.aside", "corpus/facts.jsonl"):
        (paths.root / name).unlink(missing_ok=True)
        (paths.root / name).mkdir()
        with pytest.raises(ConfigError, match=rf"{name} cannot be used \(Is a directory\)"):
            recall(request, said.append)
        (paths.root / name).rmdir()
    # Another time nothing is run, and what was lost is drawn again.
    shutil.rmtree(paths.corpus)
    paths.page.unlink()
    monkeypatch.setattr(command, "run_all", lambda planned, *rest, **more: _nothing_to_do(planned))
    said.clear()
    assert recall(request, said.append) == results and paths.page.exists()
    # A signal that came when all had been done ended nothing.
    assert not [line for line in said if "goes on" in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "did you mean steps"),
        (["attention_heads=0"], "model.num_attention_heads=0 must be at least 1"),
        (["ffn_hidden_size=1"], "FLOPs a token where"),
        (["--variants", "dense,"], "'' is no model of the study"),
        (["--seeds", "0"], "--seeds 0 runs nothing"),
        (["--jobs", "0"], "--jobs 0 runs nothing"),
        (["--slots", "a,4"], "--slots a,4: these are no numbers"),
        (["--quick", "--size", "full"], "drop one of them"),
        (["--size", "huge"], "--size huge is not known"),
    ],
    ids=said_as,
)
def test_bad_input_gets_one_message_and_leaves_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal("study", "recall", *arguments, "--out", str(tmp_path / "study"))
    assert not list(tmp_path.iterdir())


def test_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is not the directory of a study" in refusal("study", "recall", "--quick", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _nothing_to_do(planned: list[Planned]) -> Any:
    from mempar.tools.study.schedule import Ending

    assert all(one.is_done for one in planned)
    return Ending(stopped="SIGTERM", failed={})
