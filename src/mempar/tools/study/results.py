"""What runs come to: one object a run in results.json, checked when it is read."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file
from mempar.tools.study.directory import read_json
from mempar.tools.study.variants import VARIANTS, Entrant

# Counts beyond it are no counts.
_MOST = 1 << 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What a run knew at a step.

    Attributes:
        step: number of steps done.
        accuracy: share of the facts asked that were recalled.
        answer_loss: nats a token of their answers.
        loss: of training, mean since the point before.
        seconds: that training had taken, without evaluation.
        cpu_seconds: processor time of the same.
    """

    step: int
    accuracy: float
    answer_loss: float
    loss: float
    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """How a model was built and trained, where models of a study differ.

    Attributes:
        ffn_hidden_size: width of feed-forward networks, or of each expert.
        experts: of a block; 0 without.
        experts_of_a_token: that a token is sent to.
        memory_layers: blocks with a memory.
        tables: in all.
        table_slots: of each.
        lr: peak learning rate of dense parameters.
        values_lr: of the tables; None without.
    """

    ffn_hidden_size: int
    experts: int = 0
    experts_of_a_token: int = 0
    memory_layers: list[int] = dataclasses.field(default_factory=list)
    tables: int = 0
    table_slots: int = 0
    lr: float
    values_lr: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        variant: of the model.
        slots: of its table, or of the Memory+ whose parameters are matched; 0 without.
        seed: of initial values and data order.
        params: all parameters.
        table_params: of them in tables.
        flops_per_token: of training.
        steps: done.
        tokens: seen.
        skipped: steps that changed nothing, because gradients were not finite.
        accuracy: share of all facts that are recalled at the end.
        loss: of training, mean over the last interval.
        answer_loss: nats a token of the answers.
        coverage: share of the slots read in the last interval; None without a table.
        coverage_ever: share of the slots that were ever read.
        by_kind: accuracy by kind of fact.
        device: `cpu` or `cuda`.
        seconds: that training and saving took, without evaluation; other runs beside it make it longer.
        cpu_seconds: processor time of the same.
        model: how it was built and trained.
        curve: from evaluation to evaluation.
    """

    variant: str
    slots: int
    seed: int
    params: int
    table_params: int
    flops_per_token: int
    steps: int
    tokens: int
    skipped: int = 0
    accuracy: float
    loss: float
    answer_loss: float
    coverage: float | None = None
    coverage_ever: float | None = None
    by_kind: dict[str, float]
    device: str
    seconds: float
    cpu_seconds: float
    model: Model
    curve: list[Point]

    @property
    def entrant(self) -> Entrant:
        """Which model it is of."""
        return Entrant(variant=self.variant, slots=self.slots)


def gather_results(runs: Path) -> list[Result]:
    """Read what runs have left behind, in the order of models and seeds.

    Raises:
        ConfigError: for a file that is none of a study's, or for runs that are not of one study.
    """
    found = [result_of(read_json(path), path) for path in sorted(runs.glob("*/result.json"))]
    return _of_one_study(found, runs)


def load_results(path: Path) -> list[Result]:
    """Read results.json.

    Raises:
        ConfigError: when it is not there, not a study's, or of several.
    """
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path} holds no list of runs; results of a study are one; name a study with results.")
    return _of_one_study([result_of(each, path) for each in found], path)


def save_results(path: Path, results: Sequence[Result]) -> None:
    """Write results.json: one object a run, a line each."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(result), allow_nan=False) for result in results)
    replace_file(path, f"[\n{lines}\n]\n".encode())


def in_order(results: Sequence[Result]) -> list[Result]:
    """Models as the study names them, small tables first, seeds ascending."""
    return sorted(results, key=lambda each: (VARIANTS.index(each.variant), each.slots, each.seed))


def result_of(found: Any, path: Path) -> Result:
    """Check an object.

    Args:
        found: plain JSON.
        path: where it is from.

    Raises:
        ConfigError: when it lacks something, or a value is impossible.
    """
    try:
        parts: dict[str, Any] = {"model": Model(**_known(Model, found["model"]))}
        parts["curve"] = [Point(**_known(Point, point)) for point in found["curve"]]
        result = Result(**_known(Result, found) | parts)
        _check(result)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds what is no result of a study ({type(error).__name__}: {error}); a run writes it whole; "
            "restore or delete it."
        ) from None
    return result


def _of_one_study(results: Sequence[Result], where: Path) -> list[Result]:
    """Put runs in order that may be compared: of equal length, and of each model one a seed, built alike."""
    seen: dict[tuple[Entrant, int], Result] = {}
    first: dict[Entrant, Result] = {}
    for result in results:
        named, alike = f"{result.entrant} with seed {result.seed}", first.setdefault(result.entrant, result)
        if seen.setdefault((result.entrant, result.seed), result) is not result:
            found = "is there twice"
        elif (result.steps, result.tokens) != (results[0].steps, results[0].tokens):
            found = f"has {result.steps:,} steps where {results[0].entrant} has {results[0].steps:,}"
        elif (result.params, result.flops_per_token, result.model) != (
            alike.params,
            alike.flops_per_token,
            alike.model,
        ):
            found = f"is built otherwise than with seed {alike.seed}"
        else:
            continue
        raise ConfigError(
            f"{where}: {named} {found}; runs of a study train for as long, and count once; take out what is of another."
        )
    return in_order(results)


def _known(kind: Any, found: Any) -> dict[str, Any]:
    """What there is of the fields of a dataclass; runs note more."""
    return {field.name: found[field.name] for field in dataclasses.fields(kind) if field.name in found}


def _check(result: Result) -> None:
    if result.variant not in VARIANTS:
        raise ValueError(f"variant {result.variant!r} is not known")
    model = result.model
    counts = [result.slots, result.seed, result.params, result.table_params, result.flops_per_token, result.steps]
    counts += [result.tokens, result.skipped, *(point.step for point in result.curve)]
    counts += [model.ffn_hidden_size, model.experts, model.experts_of_a_token, model.tables, model.table_slots]
    if any(type(count) is not int or not 0 <= count < _MOST for count in (*counts, *model.memory_layers)):
        raise ValueError("counts are whole numbers from 0")
    if not result.params or not result.flops_per_token or not result.steps:
        raise ValueError("parameters, FLOPs and steps are at least 1")
    shares = [result.accuracy, *result.by_kind.values(), *(point.accuracy for point in result.curve)]
    shares += [share for share in (result.coverage, result.coverage_ever) if share is not None]
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError("shares are from 0 to 1")
    others = [result.loss, result.answer_loss, result.seconds, result.cpu_seconds, model.lr, model.values_lr or 0.0]
    for point in result.curve:
        others += [point.loss, point.answer_loss, point.seconds, point.cpu_seconds]
    if any(not math.isfinite(number) or number < 0 for number in others):
        raise ValueError("losses, seconds and rates are finite and not negative")
    if type(result.device) is not str:
        raise ValueError("a device has a name")
