"""The batch script: what it asks for, that nothing in it can run by accident, and what it does at a job's end.

Here SLURM's programs are stubs; tests/cluster has the real ones.
"""

import os
import shlex
import signal
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.tools.launch.profile import LaunchProfile, SlurmConfig
from mempar.tools.launch.slurm import AGENT, SlurmJob, options, render, submit
from mempar.tools.launch.slurm_script import BODY

STUBS = {
    "scontrol": """
        echo "scontrol $*" >>"$STUB/calls"
        case "$1 $2" in
        "show hostnames") printf 'n07\\nn08\\nn09\\n' ;;
        "show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=$4" ;;
        "show job") cat "$STUB/job" ;;
        requeue*) [ ! -e "$STUB/refuse" ] ;;
        esac
        """,
    "scancel": 'echo "scancel $*" >>"$STUB/calls"; touch "$STUB/told"',
    # Runs one task, and forgets its status once it was told, as the real one does.
    "srun": """
        echo "srun $*" >>"$STUB/calls"
        while [ "$1" != sh ]; do shift; done
        SLURM_NODEID=0 "$@"; status=$?
        [ ! -e "$STUB/told" ] || status=0
        exit "$status"
        """,
    "agent": """
        echo "agent $*" >>"$STUB/calls"
        touch "$STUB/running"
        . "$STUB/act"
        """,
}
# What agents do until they are told to end.
WAIT = 'while [ ! -e "$STUB/told" ]; do sleep 0.02; done; '
SAVE = 'mkdir -p "$RUN/checkpoints/step_00000007"; '
JOB = "   JobState=RUNNING Reason=None\n   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={}\n"


def job_at(run_dir: Path, **changes: object) -> SlurmJob:
    job = SlurmJob(
        name="smoke",
        run_dir=run_dir,
        num_nodes=2,
        ranks_per_node=8,
        gpus_per_node=8,
        profile=LaunchProfile(),
        workdir=Path("/work dir"),
    )
    return replace(job, **changes)


class Stubbed:
    """A job's script, run by bash with stubs of SLURM's programs."""

    def __init__(self, root: Path, *, max_restarts: int = 0, requeue: bool = True) -> None:
        self.root, self.run_dir = root, root / "a run"
        (self.run_dir / "launch").mkdir(parents=True)
        for name, text in STUBS.items():
            path = root / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (root / "job").write_text(JOB.format("None"))
        profile = LaunchProfile(python=str(root / "bin" / "agent"), slurm=SlurmConfig(requeue=requeue))
        self.script = root / "job.sbatch"
        self.script.write_text(render(job_at(self.run_dir, profile=profile, max_restarts=max_restarts)))

    def run(self, act: str, *, send: signal.Signals | None = None, restart: int = 0) -> tuple[int, str]:
        """Run the script once, sending it a signal when the agent runs; returns its status and its messages."""
        for name in ("running", "told", "calls"):
            (self.root / name).unlink(missing_ok=True)
        (self.root / "act").write_text(act)
        environment = {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "STUB": str(self.root),
            "RUN": str(self.run_dir),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[07-09]",
        }
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        with subprocess.Popen(["bash", self.script], env=environment, stderr=subprocess.PIPE, text=True) as process:
            if send is not None:
                until = time.monotonic() + 20.0
                while not (self.root / "running").exists() and time.monotonic() < until:
                    time.sleep(0.01)
                process.send_signal(send)
            _, said = process.communicate(timeout=20.0)
        return process.returncode, said

    def calls(self, program: str) -> list[str]:
        lines = (self.root / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{program} ")]

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 41" in self.calls("scontrol")


def test_agents_are_told_where_to_meet_from_the_allocation(tmp_path: Path):
    stubbed = Stubbed(tmp_path)
    assert stubbed.run("exit 0", restart=3) == (0, "")
    (agent,) = stubbed.calls("agent")
    assert agent == (
        f"agent -m {AGENT} {stubbed.run_dir} --nodes 2 --nproc 8 --patience 600 --rendezvous 10.1.2.3:10041 "
        "--attempt 41-3"
    )
    assert "scontrol show node --oneliner n07" in stubbed.calls("scontrol")
    (srun,) = stubbed.calls("srun")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in srun
    assert not stubbed.requeued and not stubbed.calls("scancel")


def test_failures_are_requeued_up_to_the_limit(tmp_path: Path):
    stubbed = Stubbed(tmp_path, max_restarts=2)
    for restart in range(2):
        status, said = stubbed.run("exit 7", restart=restart)
        assert status == 7 and stubbed.requeued
        assert f"restart {restart + 1} of 2" in said
    status, said = stubbed.run("exit 7", restart=2)
    assert status == 7 and not stubbed.requeued
    assert "failed with status 7, with 2 of 2 restarts done" in said
    assert len((stubbed.run_dir / "launch" / "failures-41").read_text().splitlines()) == 3


def test_bad_input_is_not_requeued(tmp_path: Path):
    stubbed = Stubbed(tmp_path, max_restarts=2)
    status, said = stubbed.run("exit 2")
    assert (status, stubbed.requeued) == (2, False)
    assert "bad input" in said


@pytest.mark.parametrize(("others", "status"), [("143", 7), ("137\n5", 5), ("9\n2\n143", 2)])
def test_status_is_that_of_the_node_that_failed_by_itself(tmp_path: Path, others: str, status: int):
    stubbed = Stubbed(tmp_path)
    assert stubbed.run(f'printf "{others}\\n" >"$RUN/launch/status-41-0.1"; exit 7')[0] == status


def test_what_a_job_of_the_same_number_left_does_not_count(tmp_path: Path):
    stubbed = Stubbed(tmp_path, max_restarts=1)
    (stubbed.run_dir / "launch" / "status-41-0.1").write_text("9\n")
    (stubbed.run_dir / "launch" / "failures-41").write_text("41-0 failed with status 9\n")
    assert stubbed.run("exit 0")[0] == 0
    assert stubbed.run("exit 7")[0] == 7 and stubbed.requeued


def test_time_limit_lets_the_run_save_and_queues_it_again(tmp_path: Path):
    stubbed = Stubbed(tmp_path)
    status, said = stubbed.run(WAIT + SAVE, send=signal.SIGUSR1)
    assert (status, stubbed.requeued) == (0, True), said
    assert stubbed.calls("scancel") == ["scancel --signal=TERM 41"]
    assert "saved before the time limit; the job is queued again" in said


@pytest.mark.parametrize(
    ("act", "status", "what"),
    [(WAIT, 0, "saved nothing"), (WAIT + SAVE + "exit 5", 5, "failed with status 5")],
    ids=["nothing saved", "failed in saving"],
)
def test_time_limit_without_a_save_is_a_failure(tmp_path: Path, act: str, status: int, what: str):
    stubbed = Stubbed(tmp_path)
    ended, said = stubbed.run(act, send=signal.SIGUSR1)
    assert (ended, stubbed.requeued) == (status, False)
    assert what in said


def test_sigterm_is_passed_on_and_nothing_is_requeued(tmp_path: Path):
    stubbed = Stubbed(tmp_path, max_restarts=2)
    status, said = stubbed.run(WAIT + SAVE + "exit 1", send=signal.SIGTERM)
    assert (status, stubbed.requeued) == (1, False)
    assert stubbed.calls("scancel") == ["scancel --signal=TERM 41"]
    assert "told to end by SLURM" in said


@pytest.mark.parametrize(("requeue", "what"), [(True, "queued again"), (False, "slurm.requeue is off")])
def test_preempted_job_is_requeued(tmp_path: Path, requeue: bool, what: str):
    stubbed = Stubbed(tmp_path, requeue=requeue)
    (tmp_path / "job").write_text(JOB.format("2026-01-01T00:00:09"))
    status, said = stubbed.run(SAVE)
    assert (status, stubbed.requeued) == (0, requeue)
    assert f"preempted; the job is {what}" in said or f"preempted; {what}" in said


def test_refused_requeue_is_said(tmp_path: Path):
    stubbed = Stubbed(tmp_path, max_restarts=1)
    (tmp_path / "refuse").touch()
    status, said = stubbed.run("exit 1")
    assert status == 1
    assert "SLURM does not queue the job again; go on with --resume" in said


def test_script_says_when_the_address_is_not_known(tmp_path: Path):
    stubbed = Stubbed(tmp_path)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("NodeAddr", "Nothing"))
    status, said = stubbed.run("exit 0")
    assert status == 1 and not stubbed.calls("agent")
    assert "does not say the address of n07" in said


def test_options_come_from_the_profile(tmp_path: Path):
    slurm = SlurmConfig(
        partition="gpu", account="lm", qos="high", time="24:00:00", constraint="h200&ib", reservation="r",
        nodelist="n1", exclude="n9", cpus_per_task=96, signal_seconds=600, extra=("--mail-type=END",),
    )  # fmt: skip
    job = job_at(tmp_path / "100%", profile=LaunchProfile(slurm=slurm))
    assert options(job) == [
        "--job-name=smoke", "--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--account=lm", "--qos=high",
        "--time=24:00:00", "--constraint='h200&ib'", "--reservation=r", "--nodelist=n1", "--exclude=n9", "--gres=gpu:8",
        "--cpus-per-task=96", "--mem=0", "--chdir='/work dir'", f"--output={tmp_path}/100%%/launch/slurm-%j.out",
        "--open-mode=append", "--signal=B:USR1@600", "--exclusive", "--requeue", "--mail-type=END",
    ]  # fmt: skip
    lines = [line for line in render(job).splitlines() if line.startswith("#SBATCH ")]
    assert lines == [f"#SBATCH {option}" for option in options(job)]
    # sbatch reads them until the first command.
    assert render(job).splitlines()[1 : 1 + len(lines)] == lines


def test_options_that_are_not_asked_for_are_left_out(tmp_path: Path):
    slurm = SlurmConfig(exclusive=False, requeue=False, gpu_option="gpus-per-node")
    assert "--gpus-per-node=8" in options(job_at(tmp_path, profile=LaunchProfile(slurm=slurm)))
    given = " ".join(options(job_at(tmp_path, profile=LaunchProfile(slurm=slurm), gpus_per_node=0)))
    assert not any(word in given for word in ("gres", "gpus", "--exclusive", "--mem", "--time", "--requeue"))
    assert "--no-requeue" in given


def test_nothing_in_a_profile_runs_by_accident(tmp_path: Path):
    bad = f"x; touch {tmp_path / 'ran'}; $(touch {tmp_path / 'ran'}) `touch {tmp_path / 'ran'}` ' \" #"
    slurm = SlurmConfig(partition=bad, account=bad, container_image=bad, container_workdir=bad, container_mounts=(bad,))
    profile = LaunchProfile(slurm=slurm, env={"A": bad}, modules=(bad,), workdir=bad, python=bad)
    script = tmp_path / "job.sbatch"
    script.write_text(render(job_at(tmp_path / bad.replace("/", "_"), name=bad, profile=profile, port=29400)))
    # Everything before the first command of SLURM's, with the variables shown.
    header = script.read_text().removesuffix(BODY)
    probe = (
        'module() { printf "%s\\n" "$@"; }\n' + header + '\nprintf "%s\\n" "$A" "${agent[0]}" "${srun_options[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:4] == ["load", bad, bad, bad]
    assert f"--container-image={bad}" in lines and "port=29400" in header
    assert not (tmp_path / "ran").exists()


def test_modules_and_setup_run_before_the_variables(tmp_path: Path):
    profile = LaunchProfile(
        modules=("cuda/12.8", "nccl"), setup=("ulimit -l unlimited",), interface="ib0", env={"A": "1"}
    )
    lines = render(job_at(tmp_path, profile=profile)).splitlines()
    wanted = ["module load cuda/12.8 nccl", "ulimit -l unlimited", "export GLOO_SOCKET_IFNAME=ib0", "export A=1"]
    places = [lines.index(line) for line in wanted]
    assert places == sorted(places)
    assert lines.index("set +u") < places[0] < places[1] < lines.index("set -u") < places[2]


def test_container_has_the_run_and_a_python_of_its_own(tmp_path: Path):
    slurm = SlurmConfig(container_image="repo#mempar:1", container_mounts=("/data:/data",), container_workdir="/w")
    script = render(job_at(tmp_path, profile=LaunchProfile(slurm=slurm)))
    given = shlex.split(script.partition("srun_options=(")[2].partition("\n)")[0])
    assert "--container-image=repo#mempar:1" in given and "--container-workdir=/w" in given
    assert f"--container-mounts=/data:/data,{tmp_path}:{tmp_path}" in given
    assert f"agent=(\n  python3\n  -m\n  {AGENT}\n" in script


def test_restarts_need_requeueing(tmp_path: Path):
    profile = LaunchProfile(slurm=SlurmConfig(requeue=False))
    with pytest.raises(ConfigError, match=r"--max-restarts 3 with slurm\.requeue off"):
        job_at(tmp_path, profile=profile, max_restarts=3)
    with pytest.raises(ConfigError, match="not printable"):
        job_at(tmp_path / "a\nb")


def test_submit_returns_the_number_and_keeps_the_script_s_word(tmp_path: Path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/given\nenv >>{tmp_path}/given\necho "77;cluster"\n')
    sbatch.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render(job_at(tmp_path, profile=LaunchProfile(slurm=SlurmConfig(partition="gpu", time="60")))))
    names = ("PARTITION", "TIMELIMIT", "REQUEUE", "NO_REQUEUE", "SIGNAL", "GRES", "ACCOUNT")
    environ = {"PATH": f"{sbatch.parent}:{os.environ['PATH']}", **{f"SBATCH_{name}": "other" for name in names}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environ["PATH"])
        assert submit(script, environ) == "77"
    given = (tmp_path / "given").read_text().splitlines()
    assert given[0] == f"--parsable {script}"
    # The script says nothing of an account, so that the user's own default is kept.
    assert [line for line in given if line.startswith("SBATCH_")] == ["SBATCH_ACCOUNT=other"]


def test_submit_says_what_is_missing_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch on this machine.*--dry-run shows") as raised:
        submit(script, os.environ)
    assert raised.value.exit_status == 2
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    with pytest.raises(ConfigError, match=r"SLURM refuses the job \(invalid partition specified: gpu\);"):
        submit(script, os.environ)
