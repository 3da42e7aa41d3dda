"""Which combinations the layout law is tested on.

All layouts, kinds of model and legs of the law appear, and every pair of values of two axes appears
in some combination (a greedy covering array, the same in every run); a few more combinations with
layouts that nobody listed are drawn at random. Experts have a list of their own: layouts that have a
meaning for them, over the legs without replay.
"""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from mempar.runtime.config import ParallelConfig, RunConfig
from toy import toy_run

# Printed in the ids of the cases that are drawn from it.
RANDOM_SEED = 2027
# Combinations that are compared to choose the next one.
CANDIDATES = 100
NUM_RANDOM = 6

# name: ranks, sizes. "c" are column shards, "r" rows, "g" a grid of both, "2h" one with two hops, "do" the
# distributed optimizer.
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
    "mp6g": (6, {"mp": 6, "mp_rows": 3}),
    "mp4g2h": (4, {"mp": 4, "mp_rows": 2, "mp_hops": 2}),
    "mp6g2h": (6, {"mp": 6, "mp_rows": 3, "mp_hops": 2}),
    "mp2c-replicas": (4, {"mp": 2, "mp_rows": 1}),
    "mp2r-replicas": (6, {"mp": 2, "mp_rows": 2}),
    "tp2-mp2c": (2, {"tp": 2, "mp": 2, "mp_rows": 1}),
    "tp2-mp2r": (2, {"tp": 2, "mp": 2, "mp_rows": 2}),
    "tp2-mp4c": (4, {"tp": 2, "mp": 4, "mp_rows": 1}),
    "tp2-mp4r": (4, {"tp": 2, "mp": 4, "mp_rows": 4}),
    "tp2sp-mp4g": (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2}),
    "pp2-mp2r": (4, {"pp": 2, "mp": 2, "mp_rows": 2}),
    "pp2vpp2-mp2c": (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 1}),
    "tp2-pp2-mp2c": (4, {"tp": 2, "pp": 2, "mp": 2, "mp_rows": 1}),
    "do-dp2": (2, {"distributed_optimizer": True}),
    "do-tp2-dp2": (4, {"tp": 2, "distributed_optimizer": True}),
    "do-mp2r": (2, {"mp": 2, "mp_rows": 2, "distributed_optimizer": True}),
}
# Layouts in which every kind of model is trained.
EVERY_KIND = ("tp2", "pp2", "mp4g")
# name: ranks, sizes, model.
MOE_LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp2": (2, {}, {"kind": "moe", "ragged": True}),
    "ep2": (2, {"ep": 2}, {"kind": "moe", "ragged": True}),
    "pp2": (2, {"pp": 2}, {"kind": "moe", "tied": True}),
    "tp2sp-ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}, {"kind": "moe"}),
    "ep2-mp2r": (2, {"ep": 2, "mp": 2, "mp_rows": 2}, {"kind": "memory_plus+moe", "ragged": True}),
    "pp2-ep2-mp2c": (4, {"pp": 2, "ep": 2, "mp": 2, "mp_rows": 1}, {"kind": "memory+moe"}),
    "tp2sp-ep2-mp4g": (
        4,
        {"tp": 2, "sequence_parallel": True, "ep": 2, "mp": 4, "mp_rows": 2},
        {"kind": "memory_plus+moe"},
    ),
    "do-ep2": (4, {"ep": 2, "distributed_optimizer": True}, {"kind": "memory_plus+moe"}),
}
LEGS = ("float64", "float32", "replayed")
AXES: dict[str, tuple[Any, ...]] = {
    "layout": tuple(LAYOUTS),
    "leg": LEGS,
    "kind": ("dense", "memory", "memory_plus", "peer", "beside", "two"),
    "optimizer": ("row_adam", "adamw", "row_adagrad"),
    "tied": (False, True),
    "ragged": (False, True),
    "extras": (False, True),
    "merge": ("off", "on"),
    "recompute": ("none", "selective", "full"),
    "uneven": (False, True),
}
# Axes that decide, with the layout, whether a combination is possible.
POSSIBLE = ("leg", "kind", "optimizer", "extras", "merge")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout of one toy run under one leg of the law."""

    name: str
    world_size: int
    leg: str
    run: RunConfig

    @property
    def single(self) -> RunConfig:
        """The same run in a single process that merges nothing, keeps its activations and has one micro-batch."""
        memories = [replace(memory, merge_duplicates="off") for memory in (self.run.memory, *self.run.more_memories)]
        train = replace(
            self.run.train,
            recompute="none",
            recompute_modules=("mlp",),
            micro_batch_size=self.run.train.global_batch_size,
        )
        return replace(
            self.run,
            memory=memories[0],
            more_memories=tuple(memories[1:]),
            parallel=ParallelConfig(),
            train=train,
        )


def is_possible(
    world_size: int, sizes: dict[str, Any], *, leg: str, kind: str, optimizer: str, extras: bool, merge: str
) -> bool:
    """Whether a combination has a meaning and is not refused by design."""
    if merge == "on" and sizes.get("mp", 1) == 1:
        return False
    if kind == "dense" and (sizes.get("mp", 1) > 1 or optimizer != "row_adam" or extras):
        return False
    return not (leg == "float64" and sizes.get("distributed_optimizer"))


def make_case(name: str, world_size: int, sizes: dict[str, Any], *, leg: str, **model: Any) -> Case:
    """Make a case with few micro-batches, but enough for every phase of a schedule.

    Pipelines have twice as many as stages: with fewer a schedule has no steady state, in which interleaving
    without overlapped p2p goes wrong. Other ranks have one, or two where these are small. An uneven batch leaves
    out the end of a micro-batch, or a whole one, or both.
    """
    pp = sizes.get("pp", 1)
    dp = world_size // (sizes.get("tp", 1) * pp)
    per_rank = 2 * pp if pp > 1 or dp == 1 else 2 if model["ragged"] else 1
    uneven = model.pop("uneven")
    samples = dp * per_rank * (1 if model["ragged"] else 2)
    missing = (1 if model["ragged"] or dp == 1 else 3 if samples > 4 else 2) if uneven else 0
    run = toy_run(
        dtype="float64" if leg == "float64" else "float32",
        global_batch_size=samples - missing,
        recompute_modules=("mlp", "core_attn"),
        **model,
        **sizes,
    )
    marks = [model["kind"] + ("+norms+gate" if model["extras"] else "")]
    marks += [] if model["recompute"] == "none" else [model["recompute"]]
    marks += ["uneven"] if uneven else []
    marks += [] if model["kind"] in ("dense", "moe") else [model["optimizer"]]
    marks += ["merged"] if model["merge"] == "on" else []
    marks += ["tied" if model["tied"] else "untied", "ragged" if model["ragged"] else "even"]
    return Case(name=f"{leg}-{name}-{'-'.join(marks)}", world_size=world_size, leg=leg, run=run)


def pairwise_cases() -> list[Case]:
    """Cover every possible pair of values of two axes with few combinations."""
    draw = random.Random(RANDOM_SEED)
    deciding = {axis: AXES[axis] for axis in ("layout", *POSSIBLE)}
    possible = [dict(zip(deciding, values, strict=True)) for values in itertools.product(*deciding.values())]
    possible = [
        axes for axes in possible if is_possible(*LAYOUTS[axes["layout"]], **{axis: axes[axis] for axis in POSSIBLE})
    ]
    draw.shuffle(possible)
    missing = {
        pair: None
        for (first, first_values), (second, second_values) in itertools.combinations(AXES.items(), 2)
        for pair in itertools.product(((first, v) for v in first_values), ((second, v) for v in second_values))
        if is_asked(dict(pair))
    }
    cases = []
    while missing:
        wanted = next(iter(missing))
        fixed = {axis: value for axis, value in wanted if axis in deciding}
        fitting = [axes for axes in possible if fixed.items() <= axes.items()]
        if not fitting:
            del missing[wanted]
            continue
        tried = []
        for _ in range(CANDIDATES):
            others = {axis: draw.choice(values) for axis, values in AXES.items() if axis not in deciding}
            chosen = others | dict(wanted) | draw.choice(fitting)
            tried.append({axis: chosen[axis] for axis in AXES})
        best = max(tried, key=lambda axes: sum(pair in missing for pair in itertools.combinations(axes.items(), 2)))
        for pair in itertools.combinations(best.items(), 2):
            missing.pop(pair, None)
        name = best.pop("layout")
        cases.append(make_case(name, *LAYOUTS[name], **best))
    return cases


def is_asked(pair: dict[str, Any]) -> bool:
    """Whether a pair of values must appear: not every variant in every layout, which all take the same roads."""
    return pair.get("layout") in EVERY_KIND or pair.get("kind", "memory_plus") == "memory_plus" or "layout" not in pair


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
        sizes["mp_hops"] = draw.choice((1, 2)) if 1 < sizes["mp_rows"] < mp else 1
        model = {axis: draw.choice(values) for axis, values in AXES.items() if axis not in ("layout", "leg")}
        leg = draw.choice(LEGS)
        marks = "-".join(
            f"{name}{int(size)}" for name, size in sizes.items() if size is not False and size > int(size is not True)
        )
        if not 4 <= stage * pp <= 8 or mp == 1:
            continue
        axes = {"leg": leg, **model}
        if is_possible(stage * pp, sizes, **{axis: axes[axis] for axis in POSSIBLE}):
            cases.append(make_case(f"seed{RANDOM_SEED}.{len(cases)}-{marks}", stage * pp, sizes, leg=leg, **model))
    return cases


def moe_cases() -> list[Case]:
    """Layouts of models with experts.

    Replaying slots is not enough for twenty steps in float32, where a token that goes to another expert is as
    macroscopic as a flipped slot: float64 is the strict leg, and float32 has one step.
    """
    cases = []
    for leg, (name, (world_size, sizes, chosen)) in itertools.product(LEGS[:2], MOE_LAYOUTS.items()):
        plain = {axis: values[0] for axis, values in AXES.items() if axis not in ("layout", "leg")}
        model = plain | chosen
        if is_possible(world_size, sizes, **{axis: {"leg": leg, **model}[axis] for axis in POSSIBLE}):
            cases.append(make_case(name, world_size, sizes, leg=leg, **model))
    return cases


def all_cases() -> list[Case]:
    """The cases in the order of the legs, so that references are ready when they are replayed."""
    cases = pairwise_cases() + random_cases() + moe_cases()
    return sorted(cases, key=lambda case: LEGS.index(case.leg))
