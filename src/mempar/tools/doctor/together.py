"""Findings about all nodes of a launch: who answers, who shares the directory, how they differ, their collectives."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.tools.doctor import machine, merging, smoke
from mempar.tools.doctor.across import Nodes, NodeState
from mempar.tools.doctor.finding import ERROR, NOTE, OK, Finding, counted, named
from mempar.tools.doctor.needs import Needs
from mempar.tools.doctor.node_commands import NodeCommand
from mempar.tools.doctor.smoke import PATIENCE_SECONDS, START_SECONDS, Outcome
from mempar.tools.doctor.smoke_rank import read_reports
from mempar.tools.doctor.wire import ENDED, Answer, Question, Trial

# That nodes wait for each other before their ranks start: torch is imported in that time.
_GATHER_SECONDS = 120.0
# Several nodes lose each other at once, and some need not say it.
_OTHERS_SECONDS = 3.0
# ssh's own failures, as its manual has it.
_OF_SSH = 255
_CHECK = "smoke.collectives"


@dataclass(frozen=True, kw_only=True)
class Site:
    """The nodes to look at, and how they are reached.

    Attributes:
        names: as far as they are known.
        hosts: the same where the command chose them, as the nodes reach each other; empty where a scheduler did.
        commands_for: given the shared directory, makes the commands.
        address_of: given the first node's name, where the others reach it.
        port: to meet at.
        wait_seconds: for a connection.
    """

    names: tuple[str, ...]
    hosts: tuple[str, ...]
    commands_for: Callable[[Path], Sequence[NodeCommand]]
    address_of: Callable[[str], str]
    port: int
    wait_seconds: float


def look_together(
    site: Site, needs: Needs, root: Path, num_ranks: int | None, at: Callable[[str], None]
) -> list[Finding]:
    """Look at all nodes; must be called where `KeyboardInterrupt` ends it.

    Args:
        site: the nodes.
        needs: what the run wants.
        root: its directory, which may not exist yet.
        num_ranks: of each node; None for what is there.
        at: told what is looked at.

    Raises:
        ConfigError: when the shared directory cannot be made, or there is no ssh or srun here.
    """
    shared = _shared_directory(root)
    try:
        with Nodes(site.commands_for(shared), site.names, site.wait_seconds) as nodes:
            at(f"{len(site.names)} nodes")
            question = Question(
                needs=needs, root=str(root.absolute()), num_ranks=num_ranks, shared=str(shared), hosts=site.hosts
            )
            answers = nodes.ask(question)
            findings = [_reached(nodes.states), *_sees(answers, shared), *merging.merge(answers)]
            refusal = _why_not(answers, len(site.names))
            if refusal is not None:
                return merging.by_subject([*findings, refusal])
            tried = min(answer.num_ranks for answer in answers)
            at(f"collectives of {counted(tried * len(answers), 'rank')} on {len(answers)} nodes")
            trial = Trial(
                rendezvous=f"{site.address_of(nodes.states[0].name)}:{site.port}",
                num_nodes=len(answers),
                num_ranks=tried,
                reports=str(shared),
                patience=PATIENCE_SECONDS,
                gather_seconds=_GATHER_SECONDS,
            )
            return merging.by_subject([*findings, *_try_out(nodes, trial, answers)])
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _shared_directory(root: Path) -> Path:
    """A directory in the run's, or as near above as there is one."""
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    try:
        return Path(tempfile.mkdtemp(prefix=".mempar-doctor-", dir=there))
    except OSError as error:
        raise ConfigError(
            f"{there} cannot be written ({error.strerror}); ranks report there, where all nodes see it; choose another "
            "--out."
        ) from None


def _reached(states: Sequence[NodeState]) -> Finding:
    lost = [state for state in states if state.problem]
    if not lost:
        return Finding(
            check="nodes.reached",
            level=OK,
            what=f"{len(states)} nodes answer: {named([state.name for state in states])}",
            values={"nodes": [state.name for state in states]},
        )
    names = tuple(state.name for state in lost)
    # Those behind one srun tell the same.
    why: dict[str, list[str]] = {}
    for state in lost:
        why.setdefault(state.problem, []).append(state.name)
    what = "; ".join(f"{named(given)}: {problem}" for problem, given in why.items())
    remedy = "see that Python and mempar are the same there (`python` and `modules` in the launch profile)"
    if any(state.status == _OF_SSH for state in lost):
        remedy = f"see that `ssh {names[0]} true` works without a question (network, sshd, keys), or leave it out"
    return Finding(
        check="nodes.reached",
        level=ERROR,
        what=f"{len(lost)} of {len(states)} nodes do not answer: {what}",
        rule="a run starts when all of its nodes have come, and ends when one is lost",
        remedy=remedy,
        values={"nodes": list(names)},
    )


def _sees(answers: Sequence[Answer], shared: Path) -> list[Finding]:
    """Whether all nodes have what the command wrote."""
    if not answers:
        return []
    blind = {answer.name: answer.unshared for answer in answers if answer.unshared}
    if not blind:
        return [Finding(check="nodes.directory", level=OK, what=f"all nodes that answer share {shared.parent}")]
    what = ", ".join(f"as seen from {name} it {how}" for name, how in list(blind.items())[:4])
    return [
        Finding(
            check="nodes.directory",
            level=ERROR,
            what=f"{shared.parent} is not shared: what was written there {what}",
            rule="all nodes of a run write to one directory",
            remedy="choose --out on a file system that all of them mount at the same place (in containers, too)",
            values={"nodes": list(blind)},
        )
    ]


def _why_not(answers: Sequence[Answer], num_nodes: int) -> Finding | None:
    """Why collectives are not tried out; None if they can be."""
    if len(answers) < num_nodes:
        why = f"{num_nodes - len(answers)} of {num_nodes} nodes do not answer"
    elif any(answer.unshared for answer in answers):
        why = "nodes share no directory to report in"
    elif any("torch" not in answer.packages for answer in answers):
        why = "torch is not installed on all nodes"
    else:
        return None
    return Finding(
        check=_CHECK,
        level=NOTE,
        what=f"collectives were not tried out: {why}",
        rule="ranks of all nodes take part",
        remedy="mend that first, or leave these nodes out (--nodes, hostfile)",
    )


def _try_out(nodes: Nodes, trial: Trial, answers: Sequence[Answer]) -> list[Finding]:
    """Let all ranks try their collectives."""
    began, reports = time.monotonic(), Path(trial.reports)
    nodes.start_trial(trial)
    deadline = began + trial.gather_seconds + START_SECONDS + trial.patience
    smoke.wait(nodes.has_trial_ended, reports, deadline, trial.patience)
    if any(state.said.get(ENDED, {}).get("error") for state in nodes.states):
        _wait(lambda: all(ENDED in state.said or state.problem for state in nodes.states), _OTHERS_SECONDS, nodes)
    ended = {
        int(rank): status
        for state in nodes.states
        for rank, status in state.said.get(ENDED, {}).get("statuses", {}).items()
    }
    is_over = all(ENDED in state.said for state in nodes.states)
    outcome = Outcome(
        num_ranks=trial.num_nodes * trial.num_ranks,
        reports=read_reports(reports),
        status=int(bool(ended)) if is_over else None,
        ended=ended,
        seconds=time.monotonic() - began,
    )
    lost = [_lost(state) for state in nodes.states if state.problem]
    apart = [] if outcome.reports else _apart(nodes.states)
    return lost or apart or smoke.judge(outcome, machine.link_gb_per_s(answers[0].devices))


def _wait(holds: Callable[[], bool], seconds: float, nodes: Nodes) -> None:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        nodes.look_after()
        time.sleep(0.1)


def _lost(state: NodeState) -> Finding:
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"{state.name} was lost while collectives were tried out: {state.problem}",
        rule="a run ends when one of its nodes is lost",
        remedy=f"see whether {state.name} is up and stays reached, or leave it out",
        values={"nodes": [state.name]},
    )


def _apart(states: Sequence[NodeState]) -> list[Finding]:
    """Nodes that did not find each other, in the words of one that did not get to the first."""
    said = {state.name: state.said[ENDED]["error"] for state in states if state.said.get(ENDED, {}).get("error")}
    if not said:
        return []
    name = list(said)[-1]
    what, *rest = said[name].split("; ", 2)
    rule, remedy = rest if len(rest) == 2 else ("all nodes meet at the first one", "see that they reach its address")
    return [Finding(check=_CHECK, level=ERROR, what=what, rule=rule, remedy=remedy, values={"nodes": list(said)})]
