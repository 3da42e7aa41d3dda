"""Which runs a study consists of: three sizes of the same study, each of models and seeds.

`quick` is a first look, `full` what results are reported of, both on two cores; `large` takes a GPU.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mempar.errors import ConfigError
from mempar.tools.study.settings import Settings
from mempar.tools.study.variants import (
    MEMORY,
    MEMORY_PLUS,
    MOE,
    PEER,
    VARIANTS,
    WITHOUT_SLOTS,
    Entrant,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study.

    Attributes:
        settings: of every run.
        slots: sizes of the tables of `memory_plus`.
        matched_slots: the size at which all that have a size are compared: of the table of `memory`, and of the
            Memory+ whose parameters MoE and PEER have.
        variants: that take part.
        num_seeds: of each model.
    """

    settings: Settings
    slots: tuple[int, ...]
    matched_slots: int
    variants: tuple[str, ...] = VARIANTS
    num_seeds: int = 3

    @property
    def entrants(self) -> list[Entrant]:
        """The models, in the order in which they run."""
        slots: dict[str, tuple[int, ...]] = dict.fromkeys(WITHOUT_SLOTS, (0,))
        slots |= dict.fromkeys((MOE, PEER, MEMORY), (self.matched_slots,)) | {MEMORY_PLUS: self.slots}
        return [Entrant(variant=name, slots=number) for name in self.variants for number in slots[name]]

    @property
    def runs(self) -> Iterator[tuple[Entrant, int]]:
        """Models and seeds: all models with one seed before any with another, so that what is there compares."""
        return ((entrant, seed) for seed in range(1, self.num_seeds + 1) for entrant in self.entrants)


STUDIES = {
    "quick": Study(settings=Settings(facts=2000, steps=1600), slots=(4096, 65536), matched_slots=4096, num_seeds=1),
    "full": Study(settings=Settings(facts=4000, steps=5000), slots=(1024, 4096, 16384, 65536), matched_slots=4096),
    # Rates and widths are those of larger models as they are usually trained: nobody has tuned them for this.
    "large": Study(
        settings=Settings(
            facts=60000,
            steps=20000,
            vocab_size=4096,
            batch_size=256,
            hidden_size=256,
            num_layers=8,
            attention_heads=4,
            ffn_hidden_size=688,
            init_std=0.02,
            lr=3e-3,
            values_lr=3e-2,
            warmup_steps=500,
            memory_layers=(4,),
            memory_plus_layers=(2, 4, 6),
            memory_heads=4,
            top_k=16,
            key_dim=64,
            evaluation_interval=1000,
        ),
        slots=(4096, 16384, 65536, 262144),
        matched_slots=65536,
    ),
}


def study_of(
    size: str,
    *,
    variants: Sequence[str] = (),
    slots: Sequence[int] = (),
    num_seeds: int | None = None,
    given: Sequence[str] = (),
) -> Study:
    """A study of some size, changed as the user wants it.

    Args:
        size: quick, full or large.
        variants: to take part; all of that size unless given.
        slots: of Memory+'s tables; those of that size unless given. The others are compared at the largest of them,
            where they do not hold what the size compares at.
        num_seeds: of each model.
        given: settings as `KEY=VALUE`.

    Raises:
        ConfigError: for an unknown size, variant or setting, with near names, and for a value that is none.
    """
    if size not in STUDIES:
        raise ConfigError(f"--size {size} is not known; a study is of one of: {', '.join(STUDIES)}; use one of these.")
    study = STUDIES[size]
    if num_seeds is not None and num_seeds < 1:
        raise ConfigError(f"--seeds {num_seeds} runs nothing; every model needs at least one seed; raise it.")
    check_variants(variants, "--variants")
    for number in slots:
        if number < 1 or math.isqrt(number) ** 2 != number:
            raise ConfigError(
                f"--slots: no table has {number} slots; product keys make a square of them, such as 1024, 4096 or "
                "16384; give squares."
            )
    settings = _with(study.settings, given)
    check_variants(settings.lr_of, "lr_of")
    return dataclasses.replace(
        study,
        settings=settings,
        variants=tuple(name for name in study.variants if not variants or name in variants),
        slots=tuple(sorted(set(slots))) or study.slots,
        matched_slots=study.matched_slots if not slots or study.matched_slots in slots else max(slots),
        num_seeds=num_seeds or study.num_seeds,
    )


def check_variants(names: Iterable[str], given: str) -> None:
    """Refuse names that are no variant.

    Args:
        names: to look at.
        given: where they were given.

    Raises:
        ConfigError: with near names.
    """
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"{given}: '{name}' is no model of the study; {_hint(name, VARIANTS)}")


def _with(settings: Settings, given: Sequence[str]) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    schema: Any = OmegaConf.structured(settings)
    OmegaConf.set_readonly(schema, False)
    for assignment in given:
        name, equals, _ = assignment.partition("=")
        if not equals:
            raise ConfigError(f"'{assignment}' is no setting; write KEY=VALUE, e.g. steps=500.")
        if name not in names:
            raise ConfigError(f"'{name}' is no setting of the study; {_hint(name, names)}")
        try:
            value = OmegaConf.from_dotlist([assignment])
            # ??? would leave what is there, and an interpolation may lead nowhere.
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            schema.merge_with(value)
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError):
            kind = next(field.type for field in dataclasses.fields(Settings) if field.name == name)
            named = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            raise ConfigError(f"'{assignment}': {name} must be {named}; give a value of that type.") from None
    found: Any = OmegaConf.to_object(schema)
    return found


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"use one of {', '.join(known)}."
