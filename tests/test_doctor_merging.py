"""Findings of several nodes as one list (mempar.tools.doctor merging, wire)."""

import dataclasses
import json

import pytest

from mempar.runtime.hardware import GPUS
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from mempar.tools.doctor.merging import by_subject, merge
from mempar.tools.doctor.needs import Needs
from mempar.tools.doctor.wire import (
    Answer,
    Inbox,
    Question,
    Trial,
    lines_of,
    read_answer,
    read_question,
    read_trial,
    write_question,
    write_trial,
)


def finding(check: str, what: str, level: str = OK, **values: object) -> Finding:
    told = {"rule": "it should", "remedy": f"mend {what}"} if level != OK else {}
    return Finding(check=check, level=level, what=what, values=values, **told)  # type: ignore[arg-type]


def answers(*findings: list[Finding], **others: list[object]) -> list[Answer]:
    """One a node; `others` are lists of their other attributes."""
    given = [{name: values[index] for name, values in others.items()} for index in range(len(findings))]
    return [
        Answer(name=f"n{index}", findings=list(found), **more)  # type: ignore[arg-type]
        for index, (found, more) in enumerate(zip(findings, given, strict=True))
    ]


def test_what_all_nodes_say_is_said_once() -> None:
    same = [finding("versions.torch", "torch 2.13", cuda="12.8"), finding("limits.shm", "1 GiB", WARNING)]
    assert merge(answers(same, same, same)) == same


def test_what_differs_has_the_names_of_nodes() -> None:
    small, large = finding("limits.shm", "64.0 MiB", WARNING), finding("limits.shm", "1.0 GiB")
    files = [finding("limits.open_files", text) for text in ("1024 open files", "65536 open files")]
    core = finding("limits.core", "not limited", NOTE)
    found = merge(answers([large, files[1]], [small, files[0], core], [large, files[1]]))
    said = [(one.check, one.what, one.nodes) for one in found]
    assert said == [
        ("limits.shm", "1.0 GiB", ("n0", "n2")),
        ("limits.shm", "64.0 MiB", ("n1",)),
        ("limits.open_files", "65536 open files", ("n0", "n2")),
        ("limits.open_files", "1024 open files", ("n1",)),
        ("limits.core", "not limited", ("n1",)),
    ]


def test_what_is_another_on_every_node_is_said_of_one() -> None:
    rates = [finding("disk.rate", f"{rate} MB/s", rate=rate) for rate in (400, 500, 600)]
    slow = finding("disk.rate", "3 MB/s", WARNING, rate=3)
    fast, lame = merge(answers([rates[0]], [slow], [rates[1]], [rates[2]]))
    assert fast.what == "400 MB/s (on n0; 2 others likewise, in other figures)" and fast.nodes == ("n0", "n2", "n3")
    assert fast.values["by_node"] == {"n0": {"rate": 400}, "n2": {"rate": 500}, "n3": {"rate": 600}}
    assert lame == dataclasses.replace(slow, nodes=("n1",))


@pytest.mark.parametrize(
    ("packages", "what"),
    [
        ([{"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}], "torch 2.13 on n0, n2, 2.12 on n1"),
        ([{"torch": "2.13"}, {"torch": "2.13"}, {}], "torch 2.13 on n0, n1, missing on n2"),
    ],
)
def test_other_versions_are_an_error(packages: list[object], what: str) -> None:
    (found,) = merge(answers([], [], [], packages=packages))
    assert found.check == "versions.nodes" and found.level == ERROR and what in found.what
    assert merge(answers([], [], packages=[{"torch": "2.13"}] * 2)) == []


def test_other_gpus_are_an_error() -> None:
    (found,) = merge(answers([], [], [], devices=[("H100",) * 8, ("H100",) * 7, ("H100",) * 8]))
    assert found.check == "devices.nodes" and found.level == ERROR
    assert found.what == "nodes have other GPUs: 8 x H100 on n0, n2, 7 x H100 on n1"
    (found,) = merge(answers([], [], devices=[("H100",), ()]))
    assert "none on n1" in found.what


def test_subjects_stay_together() -> None:
    mixed = [finding(check, "") for check in ("clocks.kept", "smoke.collectives", "clocks.skew")]
    assert [one.check for one in by_subject(mixed)] == ["clocks.kept", "clocks.skew", "smoke.collectives"]


def test_questions_and_trials_go_over_in_one_line() -> None:
    needs = Needs(name="large", gpu=GPUS["h100"], world=16, num_nodes=2)
    question = Question(needs=needs, root="/a b", num_ranks=8, shared="/a b/c", hosts=("x", "y"))
    for one in (question, dataclasses.replace(question, needs=Needs(), num_ranks=None, hosts=())):
        assert read_question(write_question(one)) == one and "\n" not in write_question(one)
    trial = Trial(rendezvous="a:1", num_nodes=2, num_ranks=3, reports="/r", patience=1.5, gather_seconds=2.0)
    assert read_trial(write_trial(trial)) == trial


def test_messages_of_nodes_may_mingle() -> None:
    found = [finding("disk.rate", "slow\n@mempar-doctor " * 400, WARNING, rate=3)]
    sent = [Answer(name=f"n{rank}", findings=found, packages={"torch": "2"}, devices=("H100",)) for rank in range(2)]
    lines = [lines_of(rank, "answer", json.loads(json.dumps(dataclasses.asdict(one)))) for rank, one in enumerate(sent)]
    assert len(lines[0]) > 5 and max(map(len, lines[0])) < 4000 and not any("\n" in line for line in lines[0])
    inbox = Inbox()
    heard = [inbox.hear(line) for pair in zip(*lines, strict=True) for line in pair]
    whole = [message for message in heard if message is not None]
    assert [(rank, kind) for rank, kind, _ in whole] == [(0, "answer"), (1, "answer")]
    assert [read_answer(values) for *_, values in whole] == sent
    for chatter in ("Welcome to node1", "", "@mempar-doctor {", "srun: error"):
        with pytest.raises(ValueError):
            inbox.hear(chatter)
