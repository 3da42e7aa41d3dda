"""What the command and its nodes say to each other: JSON over the pipes of ssh or srun.

The command writes one line a message, the same one to all nodes, and beats in between. Nodes write theirs in short
lines that srun passes on whole, however those of several nodes mingle, and that are told from whatever else a shell
writes. Nothing here imports torch.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mempar.runtime.hardware import GPUS
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.needs import Needs

# Of a node's messages: it is there, what it found, how its ranks ended, and what kept it from either.
HELLO, ANSWER, ENDED, FAILED = "hello", "answer", "ended", "failed"
_MARK = "@mempar-doctor "
# srun passes on lines of up to some kilobytes in one piece.
_PART_LENGTH = 800


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every node is to look at.

    Attributes:
        needs: what the run wants.
        root: directory of the run.
        num_ranks: of each node; None for what is there.
        shared: directory that the command made, which all nodes should see.
        hosts: names of all nodes, where the command chose them; their numbers are places in it.
    """

    needs: Needs
    root: str
    num_ranks: int | None
    shared: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a node found.

    Attributes:
        name: of the node.
        findings: about it.
        unshared: what is wrong with the shared directory as it sees it; empty if it can write there.
        packages: versions by name, Python's too.
        devices: names of the GPUs that it can use.
        num_ranks: that can be tried out on it.
    """

    name: str
    findings: list[Finding]
    unshared: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Collectives that all nodes are to try out together.

    Attributes:
        rendezvous: HOST:PORT of the first node.
        num_nodes: how many there are.
        num_ranks: on each.
        reports: directory that all see.
        patience: seconds that ranks wait for each other.
        gather_seconds: that nodes wait for each other before.
    """

    rendezvous: str
    num_nodes: int
    num_ranks: int
    reports: str
    patience: float
    gather_seconds: float


def write_question(question: Question) -> str:
    """A line that asks it."""
    gpu = next((name for name, known in GPUS.items() if known == question.needs.gpu), "")
    return json.dumps({**asdict(question), "needs": {**asdict(replace(question.needs, gpu=None)), "gpu": gpu}})


def read_question(line: str) -> Question:
    """The question that a line asks."""
    said = json.loads(line)
    needs = Needs(**{**said["needs"], "gpu": GPUS.get(said["needs"]["gpu"])})
    return Question(**{**said, "needs": needs, "hosts": tuple(said["hosts"])})


def write_trial(trial: Trial) -> str:
    """A line that tells of it."""
    return json.dumps(asdict(trial))


def read_trial(line: str) -> Trial:
    """The trial that a line tells of."""
    return Trial(**json.loads(line))


def read_answer(said: dict[str, Any]) -> Answer:
    """An answer, out of a message's values."""
    findings = [Finding(**{**found, "nodes": tuple(found["nodes"])}) for found in said["findings"]]
    return Answer(**{**said, "findings": findings, "devices": tuple(said["devices"])})


def lines_of(node_rank: int, kind: str, values: dict[str, Any]) -> list[str]:
    """A node's message, in lines."""
    text = json.dumps([kind, values])
    parts = [text[start : start + _PART_LENGTH] for start in range(0, len(text), _PART_LENGTH)]
    last = len(parts) - 1
    return [f"{_MARK}{json.dumps([node_rank, index == last, part])}" for index, part in enumerate(parts)]


class Inbox:
    """Puts messages of nodes together."""

    def __init__(self) -> None:
        self._parts: dict[int, str] = {}

    def hear(self, line: str) -> tuple[int, str, dict[str, Any]] | None:
        """Take a line.

        Returns:
            A node's number, the kind and the values of the message that the line completes; None while it does not.

        Raises:
            ValueError: when the line is no part of a message.
        """
        if not line.startswith(_MARK):
            raise ValueError(line)
        node_rank, is_last, part = json.loads(line.removeprefix(_MARK))
        text = self._parts.pop(node_rank, "") + part
        if not is_last:
            self._parts[node_rank] = text
            return None
        kind, values = json.loads(text)
        return node_rank, kind, values
