"""What several nodes found, as one list: what all say alike is said once, what differs with the nodes' names."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from mempar.tools.doctor.finding import ERROR, Finding, counted, named
from mempar.tools.doctor.wire import Answer

# Of these subjects texts hold names, addresses, rates and room, which are another on every node: the level tells them
# apart, and the text is one node's.
_EACH_ITS_OWN = ("network", "disk", "clocks")


def merge(answers: Sequence[Answer]) -> list[Finding]:
    """Findings of nodes, and how the nodes differ.

    Args:
        answers: in the order of nodes.
    """
    alike: dict[tuple[str, ...], list[tuple[str, Finding]]] = {}
    for answer in answers:
        for finding in answer.findings:
            alike.setdefault(_kind(finding), []).append((answer.name, finding))
    # The ranks tried out and the first check of a subject decide the order, as on one machine.
    checks = list(dict.fromkeys(key[0] for key in alike))
    groups = sorted(alike.items(), key=lambda item: checks.index(item[0][0]))
    merged = [_one(group, len(answers)) for _, group in groups]
    return by_subject([*_versions(answers), *_devices(answers), *merged])


def by_subject(findings: Iterable[Finding]) -> list[Finding]:
    """Findings of a subject together, in the order in which subjects first come."""
    findings = list(findings)
    subjects = list(dict.fromkeys(_subject(finding) for finding in findings))
    return sorted(findings, key=lambda finding: subjects.index(_subject(finding)))


def _subject(finding: Finding) -> str:
    return finding.check.partition(".")[0]


def _kind(finding: Finding) -> tuple[str, ...]:
    """What findings share that say the same."""
    if _subject(finding) in _EACH_ITS_OWN:
        return finding.check, finding.level
    return finding.check, finding.level, finding.what, finding.rule, finding.remedy


def _one(group: list[tuple[str, Finding]], num_nodes: int) -> Finding:
    first_name, first = group[0]
    names = tuple(name for name, _ in group)
    what = first.what
    if any(finding.what != what for _, finding in group):
        others = len(group) - 1
        what = f"{what} (on {first_name}; {counted(others, 'other')} likewise, in other figures)"
    values = first.values
    if any(finding.values != values for _, finding in group):
        values = {"by_node": {name: finding.values for name, finding in group}}
    return replace(first, what=what, values=values, nodes=() if len(group) == num_nodes else names)


def _versions(answers: Sequence[Answer]) -> list[Finding]:
    """Packages whose versions differ between nodes."""
    packages = sorted({package for answer in answers for package in answer.packages})
    differing = {
        package: said
        for package in packages
        if (said := _who_has(answers, lambda answer, package=package: answer.packages.get(package, "missing")))
        and len(said) > 1
    }
    if not differing:
        return []
    what = "; ".join(f"{package} {_in_words(said)}" for package, said in differing.items())
    return [
        Finding(
            check="versions.nodes",
            level=ERROR,
            what=f"nodes have other versions: {what}",
            rule="ranks compute the same and speak the same protocols only with the same packages",
            remedy="use one environment that all nodes share, or one container; `python` in the profile names it",
            values=differing,
        )
    ]


def _devices(answers: Sequence[Answer]) -> list[Finding]:
    """GPUs whose kinds or numbers differ between nodes."""
    said = _who_has(answers, lambda answer: _counted_devices(answer.devices))
    if len(said) < 2:
        return []
    return [
        Finding(
            check="devices.nodes",
            level=ERROR,
            what=f"nodes have other GPUs: {_in_words(said)}",
            rule="every node of a run starts as many ranks, one a GPU, and the slowest sets the pace",
            remedy="leave out those that differ (slots in the hostfile, slurm.constraint or slurm.exclude in the "
            "profile), or see their drivers",
            values=said,
        )
    ]


def _counted_devices(devices: Sequence[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(devices).items()) or "none"


def _who_has(answers: Sequence[Answer], what: Callable[[Answer], str]) -> dict[str, Any]:
    """Names of nodes by what they have, the most common first."""
    said: dict[str, list[str]] = {}
    for answer in answers:
        said.setdefault(what(answer), []).append(answer.name)
    return dict(sorted(said.items(), key=lambda item: -len(item[1])))


def _in_words(said: dict[str, list[str]]) -> str:
    return ", ".join(f"{what} on {named(names)}" for what, names in said.items())
