"""`mempar launch --on ssh` on two hosts: the layout law, and what happens when a host, a link or a person ends it."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from hosts import Hosts
from runs import ACROSS, MEMPAR, SETTINGS, STEPS, check_same, step_of, tell, train_alone, wait_for_step

pytestmark = pytest.mark.cluster
Process = subprocess.Popen[str]


class Launcher:
    """Launches the small run over ssh, always into the same directory."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self.hosts, self.run = hosts, directory / "run"
        self.profile = directory / "profile.yaml"
        [option, config] = hosts.ssh_options
        assert option == "-F"
        self.profile.write_text(f"ssh: {{config: {config}}}\nenv: {{OMP_NUM_THREADS: 1}}\n")

    def command(self, *more: str) -> list[str]:
        where = ["--on", "ssh", "--hostfile", str(self.hosts.hostfile(slots=1)), "--profile", str(self.profile)]
        return [*MEMPAR, "launch", "smoke", *SETTINGS, *ACROSS, *where, "--nodes", "2", "--out", str(self.run), *more]

    def start(self, *more: str) -> Process:
        return self.hosts.start(self.command(*more))


def ended(process: Process, seconds: float = 300.0) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def test_run_over_ssh_goes_on_exactly_whatever_ends_it(hosts: Hosts, tmp_path: Path) -> None:
    launcher = Launcher(hosts, tmp_path)
    first = launcher.start()
    alone = train_alone(tmp_path / "alone")
    # A person ends it: it saves.
    wait_for_step(launcher.run, 5, first)
    tell(first, signal.SIGTERM)
    status, said = ended(first)
    assert status == 0, said
    assert "[hostA] ended by SIGTERM at step" in said and "saved; continue with --resume" in said
    assert hosts.wait_until_idle() == []
    # A link drops: all ends, on both sides of it, and the checkpoint before it is there.
    second = launcher.start("--resume")
    wait_for_step(launcher.run, step_of(launcher.run) + 10, second)
    hosts.drop_link("hostB")
    began = time.monotonic()
    status, said = ended(second)
    assert status == 1, said
    assert "the connection to hostB was lost" in said.splitlines()[-1]
    assert time.monotonic() - began < 60.0
    # Beyond the link the agent hears nothing, and ends its ranks.
    assert hosts.wait_until_idle(60.0) == []
    hosts.restore_link("hostB")
    # The daemon of one connection is killed: started again by itself, from the last checkpoint.
    third = launcher.start("--resume", "--max-restarts", "1")
    wait_for_step(launcher.run, step_of(launcher.run) + 10, third)
    hosts.kill_sshd("hostB")
    hosts.start_sshd("hostB")
    status, said = ended(third)
    assert status == 0, said
    assert "restart 1 of 1, from the last good checkpoint" in said
    assert step_of(launcher.run) == STEPS
    check_same(launcher.run, alone)
    assert hosts.wait_until_idle() == []
    assert (launcher.run / "launch" / "profile.yaml").is_file()


@pytest.mark.parametrize("how", ["down", "port"])
def test_what_cannot_start_is_bad_input(hosts: Hosts, tmp_path: Path, how: str) -> None:
    launcher = Launcher(hosts, tmp_path)
    if how == "down":
        hosts.drop_link("hostB")
        status, said = ended(launcher.start())
        assert "1 of 2 hosts cannot be used" in said and "hostB" in said
        assert not launcher.run.exists()
    else:
        with hosts.start(["python3", "-m", "http.server", "29512"], on="hostA") as taken:
            try:
                status, said = ended(launcher.start("--port", "29512"))
            finally:
                taken.terminate()
        assert "port 29512 cannot be used on the head node hostA" in said
    assert status == 2
    assert "\nmempar: " in said and "Traceback" not in said
    assert hosts.wait_until_idle() == []
