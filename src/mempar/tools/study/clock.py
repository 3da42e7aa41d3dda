"""How long the steps of a run have taken, through interruptions: a line a step, in the directory of the run."""

import json
import time
from pathlib import Path

from mempar.runtime.durable import replace_file
from mempar.runtime.metrics import read_rows


class Clock:
    """Adds up what steps take.

    Attributes:
        seconds: so far.
        cpu_seconds: of this process, all of its threads, and of those that went before it.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Go on with what the first steps took.

        Args:
            path: the file that grows by a line each step; those behind the first steps are cut off.
            step: steps done so far.
        """
        rows = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._path = path
        self.seconds: float = sum(row["seconds"] for row in rows)
        self.cpu_seconds: float = sum(row["cpu_seconds"] for row in rows)
        self.go_on()

    def go_on(self) -> None:
        """Begin to count here: what lies behind belongs to no step."""
        self._since, self._cpu_since = time.monotonic(), time.process_time()

    def note(self, step: int) -> None:
        """A step has been done."""
        row = {"seconds": time.monotonic() - self._since, "cpu_seconds": time.process_time() - self._cpu_since}
        self.go_on()
        self.seconds += row["seconds"]
        self.cpu_seconds += row["cpu_seconds"]
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
