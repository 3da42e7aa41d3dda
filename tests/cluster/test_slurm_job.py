"""Batch scripts on a real SLURM of two nodes, with a stub for the nodes' agent.

What is asserted of SLURM itself, beside what the script does, is what the script relies on.
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.recipes import RECIPES
from mempar.tools.launch.profile import LaunchProfile, SlurmConfig
from mempar.tools.launch.slurm import SlurmJob, render, submit
from slurm_cluster import NODES, NUM_ABSENT, SlurmCluster

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
# Of a limit of two minutes: SLURM looks at limits every 30 seconds, and signals as much earlier.
SIGNAL_SECONDS = 55
LIMIT_SECONDS = 120.0
# SLURM has done what it is asked, and ends the job, before its answer is there.
LATE_ANSWER = 'scontrol() { command scontrol "$@" && { [[ $1 != requeue ]] || sleep 2; }; }'


class Job:
    """A submitted job, whose agents do one thing after another, restart by restart."""

    def __init__(self, slurm: SlurmCluster, root: Path, acts: list[str], *, max_restarts: int = 0, **settings: Any):
        # A name that wants quoting.
        self.slurm, self.run_dir = slurm, root / "a run, 100%; $(false)"
        (self.run_dir / "launch").mkdir(parents=True)
        (self.run_dir / "act.json").write_text(json.dumps(acts))
        profile = LaunchProfile(
            env={"PYTHONPATH": str(HERE), "GIVEN": "a 'b' \"c\" $d"},
            python=sys.executable,
            setup=(LATE_ANSWER,),
            slurm=SlurmConfig(**settings),
        )
        self.script = self.run_dir / "launch" / "job.sbatch"
        job = SlurmJob(
            name="stub",
            run_dir=self.run_dir,
            num_nodes=2,
            ranks_per_node=3,
            gpus_per_node=0,
            profile=profile,
            workdir=root,
            max_restarts=max_restarts,
            agent="stub_node",
        )
        self.script.write_text(render(job))
        self.number = submit(self.script, slurm.environment)

    def seen(self, restart: int) -> list[dict[str, Any]]:
        """Wait for both agents of an attempt; returns what they saw."""
        files = [self.run_dir / f"seen-{restart}-{rank}" for rank in range(2)]

        def have_come() -> bool:
            # Not 10 seconds later, as jobs are that are queued again.
            if restart and self.slurm.job(self.number)["Reason"] == "BeginTime":
                self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            return all(file.exists() for file in files)

        self.slurm.until(have_come, f"agents of attempt {restart}")
        return [json.loads(file.read_text()) for file in files]

    def ended(self, *states: str) -> dict[str, str]:
        return self.slurm.wait(self.number, *states)

    @property
    def output(self) -> str:
        return (self.run_dir / "launch" / f"slurm-{self.number}.out").read_text()


def test_two_nodes_meet_at_the_first_one_s_address(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["finish"])
    seen = job.seen(0)
    assert [one["node"] for one in seen] == list(NODES)
    assert {one["host"] for one in seen} == {"127.0.0.1"}
    assert {(one["nproc"], one["given"]) for one in seen} == {(3, "a 'b' \"c\" $d")}
    assert job.ended("COMPLETED")["ExitCode"] == "0:0"
    assert "0: n1 does: finish" in job.output and "1: n2 does: finish" in job.output


def test_run_told_to_end_saves_and_is_done(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["go on"], max_restarts=1)
    job.seen(0)
    slurm.run("scancel", "--signal=TERM", job.number)
    assert job.ended("COMPLETED")["Restarts"] == "0"
    assert (job.run_dir / "checkpoints" / "step_00000000").is_dir()


def test_failed_save_is_seen_though_slurm_forgets_it(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["cannot save"])
    job.seen(0)
    slurm.run("scancel", "--signal=TERM", job.number)
    assert job.ended("FAILED")["ExitCode"] == "5:0"


def test_cancelled_run_saves_and_is_not_queued_again(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["go on"], max_restarts=1)
    job.seen(0)
    slurm.run("scancel", job.number)
    slurm.until(lambda: "told to end by SLURM" in job.output, "an end of the batch script")
    assert job.ended("CANCELLED")["Restarts"] == "0"
    assert (job.run_dir / "checkpoints" / "step_00000000").is_dir()


def test_time_limit_lets_the_run_save_and_go_on(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["go on", "finish"], time="2", signal_seconds=SIGNAL_SECONDS)
    job.seen(0)
    slurm.until(lambda: "the job is queued again" in job.output, "signal before the limit", LIMIT_SECONDS)
    job.seen(1)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert (job.run_dir / "checkpoints" / "step_00000000").is_dir()
    assert "saved before the time limit; the job is queued again" in job.output


def test_requeue_by_hand_lets_the_run_save_and_go_on(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["go on", "finish"])
    job.seen(0)
    slurm.run("scontrol", "requeue", job.number)
    job.seen(1)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert (job.run_dir / "checkpoints" / "step_00000000").is_dir()
    assert "told to end by SLURM" in job.output


@pytest.mark.parametrize(("partition", "said"), [("low", "told to end by SLURM"), ("grace", "preempted; the job is")])
def test_preempted_run_saves_and_goes_on(slurm: SlurmCluster, tmp_path: Path, partition: str, said: str):
    job = Job(slurm, tmp_path, ["go on", "finish"], partition=partition)
    job.seen(0)
    command = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = slurm.run(*command, "--wrap=true").strip()
    job.seen(1)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    slurm.wait(other, "COMPLETED")
    assert (job.run_dir / "checkpoints" / "step_00000000").is_dir()
    assert said in job.output, job.output


def test_failures_are_queued_again_up_to_the_limit(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["fail", "go on", "finish"], max_restarts=1)
    _, second = job.seen(1)
    os.kill(second["pid"], signal.SIGKILL)
    ended = job.ended("FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "137:0")
    # SLURM tells the other node to end before it kills it.
    assert job.output.count("n1 was told to end: True") == 2
    assert "failed with status 3, restart 1 of 1; the job is queued again" in job.output
    assert "failed with status 137, with 1 of 1 restarts done" in job.output


def test_bad_input_is_not_queued_again(slurm: SlurmCluster, tmp_path: Path):
    job = Job(slurm, tmp_path, ["refuse"], max_restarts=3)
    assert job.ended("FAILED")["ExitCode"] == "2:0"
    assert slurm.job(job.number)["Restarts"] == "0"


def test_refused_jobs_are_explained(slurm: SlurmCluster, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"SLURM refuses the job \(.*invalid partition.*\); its partition"):
        Job(slurm, tmp_path, ["finish"], partition="x; touch ran")
    assert not (tmp_path / "ran").exists()


def sizes_of(name: str) -> tuple[int, int]:
    """Nodes, and GPUs of each."""
    run = RECIPES[name]()
    kind = run.hardware.kind
    if kind is None:
        return len(NODES), 0
    return -(-max(run.hardware.gpus, run.parallel.smallest_world) // kind.gpus_per_node), kind.gpus_per_node


def test_scripts_of_all_recipes_are_accepted(slurm: SlurmCluster, tmp_path: Path):
    sizes = {**{name: sizes_of(name) for name in RECIPES}, "of no recipe": (NUM_ABSENT, 8)}
    profiles = {
        "gres": LaunchProfile(modules=("cuda",), setup=("ulimit -n 65536",), interface="ib0"),
        "gpus-per-node": LaunchProfile(slurm=SlurmConfig(container_image="repo#image", container_mounts=("/d:/d",))),
    }
    scripts = []
    for (name, (num_nodes, gpus)), (option, profile) in itertools.product(sizes.items(), profiles.items()):
        settings = {"partition": "large" if gpus else "low", "time": "24:00:00", "gpu_option": option}
        job = SlurmJob(
            name=name,
            run_dir=tmp_path / name,
            num_nodes=num_nodes,
            ranks_per_node=gpus or 1,
            gpus_per_node=gpus,
            profile=dataclasses.replace(profile, slurm=dataclasses.replace(profile.slurm, **settings)),
            workdir=tmp_path,
            max_restarts=3,
        )
        scripts.append(tmp_path / f"{name}-{option}.sbatch")
        scripts[-1].write_text(render(job))
        said = slurm.run("sbatch", "--test-only", str(scripts[-1]))
        assert f"on nodes {'absent[001' if gpus else 'n[1'}" in said or f"on nodes absent{num_nodes:03}" in said, said
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
