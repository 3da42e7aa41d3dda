"""Versions and the ranges that packages declare, as far as `importlib.metadata` shows them; no dependency for it."""

import re
from dataclasses import dataclass

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$")
_CLAUSE = re.compile(r"^(==|>=|<=|!=|~=|<|>)\s*([\w.*+!-]+)$")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One line of what a package needs.

    Attributes:
        name: of the package, as pip spells it: lower case, with dashes.
        versions: clauses such as `>=0.16.1,<0.20`; empty for any version.
        marker: when it is needed; empty for always.
    """

    name: str
    versions: str
    marker: str

    @property
    def is_extra(self) -> bool:
        """Whether only an extra asks for it."""
        return "extra" in self.marker


def parse(line: str) -> Requirement | None:
    """Read a requirement; None for one that is a URL or the like."""
    found = _REQUIREMENT.match(line.strip())
    if found is None or "@" in found.group(2):
        return None
    name, versions, marker = found.groups()
    return Requirement(name=normal(name), versions=versions.replace(" ", ""), marker=(marker or "").strip())


def normal(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (3, 7, 1) of `3.7.1+git5b8`; a pre-release counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found.group().split(".")) if found else ()


def satisfies(version: str, versions: str) -> bool:
    """Whether a version lies in a range; clauses that are not understood are taken as satisfied."""
    return all(_holds(version, clause) for clause in versions.split(",") if clause)


def _holds(version: str, clause: str) -> bool:
    found = _CLAUSE.match(clause)
    if found is None:
        return True
    sign, bound = found.groups()
    if bound.endswith(".*"):
        same = release(version)[: len(release(bound[:-2]))] == release(bound[:-2])
        return same if sign == "==" else not same
    length = max(len(release(version)), len(release(bound)))
    have, want = ((*release(text), *[0] * length)[:length] for text in (version, bound))
    compatible = have >= want and have[: len(release(bound)) - 1] == want[: len(release(bound)) - 1]
    return {
        "==": have == want, "!=": have != want, ">=": have >= want, "<=": have <= want, ">": have > want,
        "<": have < want, "~=": compatible,
    }[sign]  # fmt: skip
