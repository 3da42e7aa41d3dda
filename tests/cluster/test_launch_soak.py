"""A run over ssh on two hosts that is hit at random moments by random faults, start-up included; `make soak`, as root.

    make soak ARGS="tests/cluster/test_launch_soak.py"
    MEMPAR_SOAK_FAULTS=100 make soak ...

However it is ended, nothing stays behind on any host, and the next start goes on: in the end all losses are those of
the single process.
"""

import datetime
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hosts import Hosts
from runs import check_same, step_of, train_alone, wait_until
from test_launch_ssh import Launcher, Process

NUM_FAULTS = int(os.environ.get("MEMPAR_SOAK_FAULTS", "20"))
STEPS = 1000
SETTINGS = [f"train.steps={STEPS}", "train.save_interval=5", "train.log_interval=50"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Faults come in turn at start-up, from the launch on, and in training, from its first new step on.
START_UP_SECONDS, TRAINING_SECONDS = 15.0, 3.0
# What a host that is cut off takes to hear that nobody speaks, and a stopped rank to be missed.
END_SECONDS = 120.0
# What a launcher says first, when it heeds signals.
RESOLVED = "a rank needs"
# Fault, and the statuses that a launch may end with.
FAULTS = {
    "SIGTERM to the launcher": (0,),
    # The latter while it still checks what it is to start.
    "SIGINT to the launcher": (0, 130),
    "SIGKILL to the launcher": (-signal.SIGKILL,),
    "SIGKILL to a rank": (1,),
    "SIGSTOP to a rank": (1,),
    "SIGKILL to an agent": (1,),
    "SIGTERM to an agent": (0,),
    "sshd is killed": (1,),
    "a link drops": (1, 2),
}


def hit(fault: str, hosts: Hosts, process: Process, draw: random.Random) -> bool:
    """Let a fault happen, if there is anything yet for it to happen to."""
    host = draw.choice(hosts.names)
    what, _, whom = fault.partition(" to a")
    if fault.endswith("the launcher"):
        os.kill(process.pid, signal.Signals[fault.partition(" ")[0]])
    elif whom:
        module = "mempar.runtime.launch.worker" if "rank" in whom else "mempar.runtime.launch.node"
        found = [pid for pid, line in hosts.processes(host).items() if f" -m {module} " in line and "sh -c" not in line]
        if not found:
            return False
        os.kill(found[0], signal.Signals[what])
    elif fault == "sshd is killed":
        hosts.kill_sshd(host)
    else:
        hosts.drop_link(host)
    return True


@pytest.mark.soak
def test_run_survives_faults_at_random_moments(hosts: Hosts, tmp_path: Path) -> None:
    seed = int(os.environ.get("MEMPAR_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"seed {seed}")
    draw, launcher = random.Random(seed), Launcher(hosts, tmp_path)
    rows: list[dict[str, object]] = []
    for number in range(NUM_FAULTS):
        fault = list(FAULTS)[number % len(FAULTS)]
        before, process = step_of(launcher.run), launcher.start("--resume", *SETTINGS)
        moment = draw.choice(("start-up", "training"))
        if moment == "training":
            wait_until(lambda: step_of(launcher.run) > before or process.poll() is not None, END_SECONDS)  # noqa: B023
        time.sleep(draw.uniform(0.5, START_UP_SECONDS if moment == "start-up" else TRAINING_SECONDS))
        running = process.poll() is None
        struck = running and hit(fault, hosts, process, draw)
        if running and not struck:
            # Nothing is there yet to be hit.
            os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        said, _ = process.communicate(timeout=END_SECONDS)
        seconds = time.monotonic() - began
        expected = FAULTS[fault] if struck else (0,)
        if RESOLVED not in said:
            # It was still loading its own modules, where Python does with a signal what it always does.
            expected = (*expected, -signal.SIGTERM, -signal.SIGINT, 130)
        row = {
            "fault": fault if struck else "none",
            "moment": moment,
            "status": process.returncode,
            "from_step": before,
        }
        rows.append({**row, "step": step_of(launcher.run), "seconds_to_end": round(seconds, 1)})
        # A run may also have come to its end before.
        assert process.returncode in (*expected, 0), f"{rows[-1]}\n{said[-2000:]}"
        assert "Traceback" not in said, said
        assert hosts.wait_until_idle(END_SECONDS) == [], rows[-1]
        for name in hosts.names:
            hosts.restore_link(name)
            if struck and fault == "sshd is killed":
                hosts.kill_sshd(name)
                hosts.start_sshd(name)
    assert any(row["moment"] == "training" and row["fault"] != "none" for row in rows)
    last = launcher.start("--resume", *SETTINGS)
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0, said
    alone = train_alone(tmp_path / "alone", SETTINGS)
    check_same(launcher.run, alone, STEPS)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {"date": today, "commit": commit.stdout.strip(), "cores": os.cpu_count(), "seed": seed, "faults": rows}
    (RESULTS / f"launch-soak-{today}.json").write_text(json.dumps(report, indent=1) + "\n")
