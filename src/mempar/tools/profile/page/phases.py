"""The phases of a step in the order in which they come, and the families that share a colour.

Colours are those of Okabe and Ito, which people with any colour vision tell apart.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Phases that do the same kind of work.

    Attributes:
        name: for legends.
        colour: of its marks.
        phases: in the order of a step.
    """

    name: str
    colour: str
    phases: tuple[str, ...] = ()


FIND = Family(
    name="find rows (query, top-K, route)",
    colour="#E69F00",
    phases=("query", "topk", "route", "topk_backward", "query_backward"),
)
INDICES = Family(
    name="exchange of indices and scores",
    colour="#56B4E9",
    phases=("split_sizes", "entries", "token_gather", "score_gather", "score_grads"),
)
READ = Family(
    name="read rows (gather, gate)",
    colour="#009E73",
    phases=("gather", "gate", "gate_backward", "gather_backward"),
)
VALUES = Family(
    name="exchange of values and gradients",
    colour="#0072B2",
    phases=(
        "values",
        "values_inside",
        "values_across",
        "output_grads",
        "output_grads_across",
        "output_grads_inside",
    ),
)
UPDATE = Family(name="sum, sync and update rows", colour="#CC79A7", phases=("reduce_rows", "copy_sync", "row_update"))
ENGINE = Family(name="megatron's collectives", colour="#D55E00")
OTHER = Family(name="other phases", colour="#8A8A8A")
FAMILIES = (FIND, INDICES, READ, VALUES, UPDATE, ENGINE, OTHER)

_ORDER = (
    "query",
    "topk",
    "route",
    "split_sizes",
    "entries",
    "gather",
    "values",
    "values_inside",
    "values_across",
    "token_gather",
    "gate",
    "gate_backward",
    "score_gather",
    "output_grads",
    "output_grads_across",
    "output_grads_inside",
    "gather_backward",
    "score_grads",
    "topk_backward",
    "query_backward",
    "reduce_rows",
    "copy_sync",
    "row_update",
)
_PLACES = {phase: place for place, phase in enumerate(_ORDER)}
_FAMILIES = {phase: family for family in FAMILIES for phase in family.phases}


def family_of(phase: str) -> Family:
    """The family of a phase; megatron's collectives are those with a group in their name."""
    return _FAMILIES.get(phase) or (ENGINE if "/" in phase else OTHER)


def in_order(phases: set[str]) -> list[str]:
    """Phases as a step goes through them; those that are not known last, by name."""
    return sorted(phases, key=lambda phase: (_PLACES.get(phase, len(_PLACES)), phase))
