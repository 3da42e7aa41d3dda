"""`mempar doctor` as its users meet it (mempar.tools.doctor command, report, finding)."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from command_line import mempar, refusal
from mempar.errors import ConfigError
from mempar.tools.doctor import command, environment, report
from mempar.tools.doctor.environment import Allocation
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding, counted, duration, named, size, worst
from mempar.tools.launch.profile import LaunchProfile

SUBJECTS = {"versions", "devices", "network", "disk", "limits", "clocks", "smoke"}
PATH = "/a/path/that/is/longer/than/the/column" * 4


def finding(level: str, check: str = "disk.room") -> Finding:
    told = {"rule": "there should be room", "remedy": "make room [by deleting]"} if level != OK else {}
    return Finding(check=check, level=level, what="1 GiB free", values={"free_bytes": 1}, **told)  # type: ignore[arg-type]


def test_the_command_finds_everything_and_prints_json_alone(tmp_path: Path) -> None:
    code = "from mempar.cli import main; main()"
    arguments = ["doctor", "smoke", "train.save_interval=50", "--nproc", "2", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    found = [Finding(**one) for one in json.loads(done.stdout)]
    assert {one.check.partition(".")[0] for one in found} == SUBJECTS
    levels = {one.check: one.level for one in found}
    assert levels["versions.megatron-core"] == "ok" and levels["disk.room"] == "ok"
    tried = next(one for one in found if one.check == "smoke.collectives")
    assert tried.level == "ok" and tried.values["ranks"] == 2 and tried.values["all_to_all_bytes_per_s"] > 0, tried
    assert done.returncode == (ERROR in levels.values()) and done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_a_finding_that_is_an_error_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for level, status in ((WARNING, 0), (ERROR, 1)):
        monkeypatch.setattr(command, "_look_here", lambda *_, level=level: [finding(OK), finding(level)])
        said = mempar("doctor")
        assert said.status == status and "make room" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok"], "did you mean smoke"),
        (["smoke", "train.stps=3"], "did you mean train.steps"),
        (["train.steps=3"], "settings follow a recipe"),
        (["--nproc", "0"], "starts no rank"),
        (["--out", "file"], "is a file"),
        (["--nodes", "2"], "this machine is one"),
        (["--on", "sshh"], "no place to run"),
        (["--on", "ssh"], "needs --hostfile"),
        (["--on", "ssh", "--hostfile", "none"], "hostfile none does not exist"),
        (["--on", "ssh", "--hostfile", "hosts", "--nodes", "3"], "hosts names 1"),
        (["--on", "slurm"], "there is no srun"),
        (["smoke", "parallel.mp=5", "--nproc", "6"], "tp*cp*dp"),
    ],
)
def test_bad_input_gets_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert message in refusal("doctor", *arguments)


@pytest.mark.parametrize(
    ("nodes", "arguments", "message"),
    [("", [], "does not know how many nodes"), ("2", ["--nodes", "3"], "--nodes 3, but job 7 has 2")],
)
def test_slurm_needs_a_number_of_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: str, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    allocation = Allocation(job="7", num_nodes=int(nodes)) if nodes else Allocation()
    monkeypatch.setattr(environment, "allocation", lambda: allocation)
    count = int(arguments[1]) if arguments else None
    with pytest.raises(ConfigError, match=message):
        command.doctor(command.Request(place="slurm", profile=LaunchProfile(), nodes=count), print)


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_says_what_to_do(width: int) -> None:
    text = io.StringIO()
    long = Finding(check="disk.rate", level=OK, what=PATH)
    found = [finding(OK), long, finding(NOTE), finding(WARNING, "versions.transformer-engine"), finding(ERROR)]
    found.append(replace(finding(NOTE, "limits.shm"), nodes=tuple(f"node{number}" for number in range(9))))
    report.show(found, Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert PATH in "".join(line.strip() for line in lines)
    # What is in brackets is no markup of rich's.
    assert text.getvalue().count("-> make room [by deleting]") == 4
    assert any("node0, node1, node2, node3 and 5 more: 1 GiB" in line for line in lines)
    assert lines[-1].strip() == "1 error, 1 warning, 2 notes, 2 ok; mend first: disk.room"


def test_findings_have_three_parts_and_are_json() -> None:
    assert json.loads(json.dumps(finding(ERROR).as_dict()))["values"] == {"free_bytes": 1}
    assert worst([finding(NOTE), finding(ERROR), finding(OK)]) == ERROR and worst([]) == OK
    with pytest.raises(AssertionError):
        Finding(check="disk.room", level=ERROR, what="full")


def test_figures_in_words() -> None:
    assert named(["a", "b"]) == "a, b" and named(list("abcdef")) == "a, b, c, d and 2 more"
    assert (size(3 << 40), size(1536 << 20), size(5 << 20), size(512)) == ("3.0 TiB", "1.5 GiB", "5.0 MiB", "0.5 KiB")
    assert [duration(time) for time in (0.002, 3, 90, 7200)] == ["2 ms", "3.0 s", "1.5 min", "2.0 h"]
    assert (counted(1, "rank"), counted(2, "rank")) == ("1 rank", "2 ranks")


def test_doctor_imports_neither_megatron_nor_torch_nor_triton() -> None:
    code = (
        "import sys, pkgutil, importlib, mempar.tools.doctor as doctor\n"
        "names = [found.name for found in pkgutil.iter_modules(doctor.__path__)]\n"
        "all(importlib.import_module('mempar.tools.doctor.' + name) for name in names)\n"
        "print(len(names) > 15, sorted({'torch', 'megatron', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True []"
