"""Which combinations the layout law is tested on.

All layouts, kinds of model and legs of the law appear, and every pair of values of two axes appears
in some combination (a greedy covering array, the same in every run); a few more combinations with
layouts that nobody listed are drawn at random.
"""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from mempar.runtime.config import ParallelConfig, RunConfig
from toy import toy_run

# Printed in the ids of the cases that are drawn from it.
RANDOM_SEED = 2027
NUM_RANDOM = 6

# name: ranks, sizes. "c" are column shards, "r" rows, "g" a grid of both, "do" the distributed optimizer.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp2sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "mp2c": (2, {"mp": 2, "mp_rows": 1}),
    "mp2r": (2, {"mp": 2, "mp_rows": 2}),
    "mp3c": (3, {"mp": 3, "mp_rows": 1}),
    "mp3r": (3, {"mp": 3, "mp_rows": 3}),
    "mp4c": (4, {"mp": 4, "mp_rows": 1}),
    "mp4r": (4, {"mp": 4, "mp_rows": 4}),
    "mp4g": (4, {"mp": 4, "mp_rows": 2}),
    "mp6c": (6, {"mp": 6, "mp_rows": 1}),
    "mp6r": (6, {"mp": 6, "mp_rows": 6}),
    "mp2c-replicas": (4, {"mp": 2, "mp_rows": 1}),
    "tp2-mp2c": (2, {"tp": 2, "mp": 2, "mp_rows": 1}),
    "tp2-mp2r": (2, {"tp": 2, "mp": 2, "mp_rows": 2}),
    "tp2-mp4c": (4, {"tp": 2, "mp": 4, "mp_rows": 1}),
    "tp2-mp4r": (4, {"tp": 2, "mp": 4, "mp_rows": 4}),
    "tp2sp-mp4g": (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2}),
    "pp2-mp2r": (4, {"pp": 2, "mp": 2, "mp_rows": 2}),
    "pp2vpp2-mp2c": (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 1}),
    "do-dp2": (2, {"distributed_optimizer": True}),
    "do-tp2-dp2": (4, {"tp": 2, "distributed_optimizer": True}),
    "do-mp2r": (2, {"mp": 2, "mp_rows": 2, "distributed_optimizer": True}),
}
LEGS = ("float64", "float32", "replayed")
AXES: dict[str, tuple[Any, ...]] = {
    "layout": tuple(LAYOUTS),
    "leg": LEGS,
    "kind": ("dense", "memory", "memory_plus"),
    "optimizer": ("row_adam", "adamw", "row_adagrad"),
    "tied": (False, True),
    "ragged": (False, True),
    "extras": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout of one toy run under one leg of the law."""

    name: str
    world_size: int
    leg: str
    run: RunConfig

    @property
    def single(self) -> RunConfig:
        """The same run in a single process."""
        return replace(self.run, parallel=ParallelConfig())


def is_possible(world_size: int, sizes: dict[str, Any], *, leg: str, kind: str, optimizer: str, extras: bool) -> bool:
    """Whether a combination has a meaning and is not refused by design."""
    if kind == "dense" and (sizes.get("mp", 1) > 1 or optimizer != "row_adam" or extras):
        return False
    return not (leg == "float64" and sizes.get("distributed_optimizer"))


def make_case(name: str, world_size: int, sizes: dict[str, Any], *, leg: str, **model: Any) -> Case:
    """Make a case with few micro-batches, but enough for every phase of a schedule.

    Pipelines have twice as many as stages: with fewer a schedule has no steady state, in which interleaving
    without overlapped p2p goes wrong. Other ranks have one, or two where these are small.
    """
    pp = sizes.get("pp", 1)
    dp = world_size // (sizes.get("tp", 1) * pp)
    per_rank = 2 * pp if pp > 1 or dp == 1 else 2 if model["ragged"] else 1
    run = toy_run(
        dtype="float64" if leg == "float64" else "float32",
        micro_batches=dp * per_rank,
        **model,
        **sizes,
    )
    marks = [model["kind"] + ("+norms+gate" if model["extras"] else "")]
    marks += [] if model["kind"] == "dense" else [model["optimizer"]]
    marks += ["tied" if model["tied"] else "untied", "ragged" if model["ragged"] else "even"]
    return Case(name=f"{leg}-{name}-{'-'.join(marks)}", world_size=world_size, leg=leg, run=run)


def pairwise_cases() -> list[Case]:
    """Cover every possible pair of values of two axes with few combinations."""
    pairs: dict[tuple[Any, ...], frozenset[Any]] = {}
    for values in itertools.product(*AXES.values()):
        axes = dict(zip(AXES, values, strict=True))
        if is_possible(*LAYOUTS[axes["layout"]], **{key: axes[key] for key in ("leg", "kind", "optimizer", "extras")}):
            pairs[values] = frozenset(itertools.combinations(enumerate(values), 2))
    # Ties fall to the first: a fixed shuffle makes it a different one every time, the same in every run.
    possible = sorted(pairs, key=str)
    random.Random(RANDOM_SEED).shuffle(possible)
    missing = set().union(*pairs.values())
    cases = []
    while missing:
        best = max(possible, key=lambda values: len(pairs[values] & missing))
        missing -= pairs[best]
        axes = dict(zip(AXES, best, strict=True))
        name = axes.pop("layout")
        cases.append(make_case(name, *LAYOUTS[name], **axes))
    return cases


def random_cases() -> list[Case]:
    """Combinations of layouts that are not in the list."""
    draw = random.Random(RANDOM_SEED)
    cases: list[Case] = []
    while len(cases) < NUM_RANDOM:
        tp, pp = draw.choice((1, 2)), draw.choice((1, 2, 4))
        dp = draw.choice((1, 2, 3, 4))
        stage = tp * dp
        mp = draw.choice([p for p in range(1, stage + 1) if stage % p == 0])
        sizes = {
            "tp": tp,
            "pp": pp,
            "vpp": 2 if pp == 2 and draw.random() < 0.5 else 1,
            "sequence_parallel": tp > 1 and draw.random() < 0.5,
            "distributed_optimizer": draw.random() < 0.3,
            "mp": mp,
            "mp_rows": draw.choice([r for r in range(1, mp + 1) if mp % r == 0]),
        }
        model = {axis: draw.choice(values) for axis, values in AXES.items() if axis not in ("layout", "leg")}
        leg = draw.choice(LEGS)
        marks = "-".join(
            f"{name}{int(size)}" for name, size in sizes.items() if size is not False and size > int(size is not True)
        )
        if not 4 <= stage * pp <= 8 or mp == 1:
            continue
        axes = {"leg": leg, "kind": model["kind"], "optimizer": model["optimizer"], "extras": model["extras"]}
        if is_possible(stage * pp, sizes, **axes):
            cases.append(make_case(f"seed{RANDOM_SEED}.{len(cases)}-{marks}", stage * pp, sizes, leg=leg, **model))
    return cases


def all_cases() -> list[Case]:
    """The cases in the order of the legs, so that references are ready when they are replayed."""
    cases = pairwise_cases() + random_cases()
    return sorted(cases, key=lambda case: LEGS.index(case.leg))
