"""A rank without torch, for what launchers do about ranks: `launch_local(..., worker="fake_rank")`.

It does what `act.json` in the run's directory says for its number, between the beginning and the end of a real rank.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.launch import worker
from mempar.runtime.launch.heartbeat import Heartbeat, Phase
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.run_dir import RunDir


def act(
    paths: RunDir, load: Path | None, launched: float, stopping: Stopping, heartbeat: Heartbeat, *, go_on: bool
) -> None:
    """Stands for `worker.run_rank`."""
    rank = heartbeat.sign.rank
    what = json.loads((paths.root / "act.json").read_text())[rank]
    (paths.root / f"started_{rank}").write_text(" ".join(sys.argv))
    if what == "start for ever":
        time.sleep(60.0)
    if what == "refuse":
        raise ConfigError("model.hidden_size=7 is odd; it must be even; use 8.")
    if what == "show environment":
        (paths.root / f"policy_{rank}").write_text(os.environ.get("OMP_WAIT_POLICY", "none"))
    step = 41 if rank == 0 else 40
    heartbeat.mark(Phase.FORWARD_BACKWARD, step)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave":
        os._exit(7)
    if what == "raise":
        raise ValueError("a number went missing")
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "loop":
        endless_loop()
    if what == "wait":
        # As a collective does: other ranks' words, and no way to hear signals.
        time.sleep(1.0)
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 1000ms for send operation")
    if what == "go on":
        while not any(stopping.wishes()):
            time.sleep(0.01)
            heartbeat.beat()
        time.sleep(0.5)
        (paths.root / f"saved_{rank}").touch()
    if what == "hear late":
        # As when a rank of another node was told first, and all have agreed and saved before this one is told.
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)
    heartbeat.mark(Phase.ENDING, step)


def endless_loop() -> None:
    while True:
        pass


if __name__ == "__main__":
    worker.run_rank = act
    sys.path.pop(0)
    worker.leave(worker.main())
