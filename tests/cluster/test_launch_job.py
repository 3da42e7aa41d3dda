"""`mempar launch --on slurm` on two nodes: the layout law, and what happens when the scheduler or a fault ends it."""

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from runs import ACROSS, MEMPAR, SETTINGS, STEPS, check_same, step_of, train_alone, wait_until
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster


class Jobs:
    """Submits the small run, always into the same directory."""

    def __init__(self, slurm: SlurmCluster, directory: Path, *settings: str) -> None:
        self.slurm, self.run, self.number = slurm, directory / "run", ""
        self.profile = directory / "profile.yaml"
        of_slurm = ", ".join(("exclusive: false", "gpu_option: none", *settings))
        self.profile.write_text(f"env: {{OMP_NUM_THREADS: 1}}\nslurm: {{{of_slurm}}}\n")

    def submit(self, *more: str) -> None:
        where = ["--on", "slurm", "--nodes", "2", "--nproc-per-node", "1", "--profile", str(self.profile)]
        done = subprocess.run(
            [*MEMPAR, "launch", "smoke", *SETTINGS, *ACROSS, *where, "--out", str(self.run), *more],
            env=self.slurm.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (self.number,) = re.findall(r"job (\d+) is submitted", done.stdout)

    def wait_for_step(self, step: int) -> None:
        def has_come() -> bool:
            job = self.slurm.job(self.number)
            # Not 10 seconds later, as jobs are that are queued again.
            if job["Reason"] == "BeginTime":
                self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            return step_of(self.run) >= step or job["JobState"] in ("FAILED", "COMPLETED")

        wait_until(has_come, 300.0)
        assert step_of(self.run) >= step, self.output

    @property
    def output(self) -> str:
        return (self.run / "launch" / f"slurm-{self.number}.out").read_text()

    def processes(self) -> list[psutil.Process]:
        """Everything that has to do with the run, wherever it lies."""
        found = psutil.process_iter(["cmdline"])
        return [one for one in found if any(str(self.run) in word for word in one.info["cmdline"] or ())]

    def rank(self, number: int) -> psutil.Process:
        """A rank, by its node's number."""
        (rank,) = [one for one in self.processes() if f"--first-rank {number} " in " ".join(one.info["cmdline"])]
        return rank


def test_job_goes_on_exactly_whatever_ends_it(slurm: SlurmCluster, tmp_path: Path) -> None:
    jobs = Jobs(slurm, tmp_path)
    jobs.submit()
    alone = train_alone(tmp_path / "alone")
    # A person ends it: it saves.
    jobs.wait_for_step(5)
    slurm.run("scancel", "--signal=TERM", jobs.number)
    assert slurm.wait(jobs.number, "COMPLETED")["Restarts"] == "0"
    assert "ended by SIGTERM at step" in jobs.output and "saved; continue with --resume" in jobs.output
    assert wait_until(lambda: not jobs.processes(), 20.0)
    # A rank is killed: the job is queued again, and goes on from the last checkpoint.
    jobs.submit("--resume", "--max-restarts", "2")
    jobs.wait_for_step(step_of(jobs.run) + 10)
    os.kill(jobs.rank(1).pid, signal.SIGKILL)
    slurm.until(lambda: "restart 1 of 2; the job is queued again" in jobs.output, "a restart")
    assert "rank 1 on n2 was killed by signal 9" in jobs.output
    # The whole step is killed, agents and ranks.
    jobs.wait_for_step(step_of(jobs.run) + 5)
    slurm.run("scancel", "--signal=KILL", f"{jobs.number}.0")
    slurm.until(lambda: "restart 2 of 2; the job is queued again" in jobs.output, "another restart")
    # Somebody has the scheduler start it elsewhere: it saves first.
    jobs.wait_for_step(step_of(jobs.run) + 5)
    slurm.run("scontrol", "requeue", jobs.number)
    jobs.wait_for_step(STEPS)
    assert slurm.wait(jobs.number, "COMPLETED")["Restarts"] == "3"
    check_same(jobs.run, alone)
    assert wait_until(lambda: not jobs.processes(), 20.0)
    assert {"command.json", "packages.txt", "profile.yaml", "job.sbatch"} <= {
        path.name for path in (jobs.run / "launch").iterdir()
    }


def test_bad_input_of_a_job_is_not_tried_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    jobs = Jobs(slurm, tmp_path, "extra: [--hold]")
    jobs.submit("--max-restarts", "3")
    # What was there when it was submitted is gone when it starts.
    (jobs.run / "config.yaml").unlink()
    slurm.run("scontrol", "release", jobs.number)
    assert slurm.wait(jobs.number, "FAILED")["ExitCode"] == "2:0"
    assert "is no run's directory as seen from node n" in jobs.output, jobs.output
    assert "bad input, which no restart mends" in jobs.output
