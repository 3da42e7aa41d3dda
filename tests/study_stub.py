"""Stands for a run of a study: `python -m study_stub DIR` does what the run's name says, without torch."""

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

from study_runs import made_up_result

# How long a stub that is to be stopped waits.
_PATIENCE_SECONDS = 60.0


def main(root: Path) -> int:
    """Be a run: leave a result, fail, or wait for SIGTERM."""
    entrant = json.loads((root / "entrant.json").read_text())
    with (root / "started").open("a") as file:
        file.write("x")
    variant, seed = entrant["variant"], int(root.name.partition("seed")[2])
    if variant == "peer":
        print("the disk is full")
        return 3
    if variant == "moe" and not (root / "ended").exists():
        signal.signal(signal.SIGTERM, lambda number, frame: ((root / "ended").touch(), sys.exit(0)))
        (root / "waiting").touch()
        time.sleep(_PATIENCE_SECONDS)
    (root / "checkpoints" / "step_00000006").mkdir(parents=True, exist_ok=True)
    result = made_up_result(variant, entrant["slots"], seed, 0.1 * seed)
    (root / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
