"""Speed and memory of converting a table between layouts, beside `cp` of the same bytes.

    python benchmarks/convert.py [--pairs 5] [--gib 8] [--max-memory 1GiB] [--directory .] [--out FILE.json]

A checkpoint with a table is made up as 8 column shards; `mempar convert` turns it into 4 row shards, a process of its
own, and `cp -r --reflink=never` with an fsync of every file copies it; alternating. Reported are median throughputs,
their ratio, and the conversion's peak of resident memory above its level after imports.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))

from made_up import MadeUp, make_checkpoint

VALUE_DIM = 1024
LAYOUTS = ("mp=8 mp_rows=1", "mp=4 mp_rows=4")
# A conversion that says how far its memory rose above where it began.
CHILD = """
import resource, sys
from pathlib import Path
from mempar.tools.convert.command import convert
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1]) * resource.getpagesize()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(), form="mempar", weights_only=False, dtype="",
        max_memory=sys.argv[4], workers=None, resume=False, dry_run=False, say=lambda line: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def synced_copy(source: Path, destination: Path) -> None:
    """`cp`, and all of it on the disk."""
    subprocess.run(["cp", "-r", "--reflink=never", source, destination], check=True)
    subprocess.run(["sync", *(path for path in destination.rglob("*") if path.is_file())], check=True)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating measurements of each side")
    parser.add_argument("--gib", type=float, default=8.0, help="size of the table")
    parser.add_argument("--max-memory", default="1GiB", help="as given to mempar convert")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk that is measured")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    num_subkeys = math.ceil(math.sqrt(arguments.gib * 2**30 / (4 * VALUE_DIM)))
    times: dict[str, list[float]] = {"convert": [], "cp": []}
    peaks: list[int] = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        source, made, copy = (Path(directory) / name for name in ("source", "made", "copy"))
        make_checkpoint(source, MadeUp(num_subkeys=num_subkeys, value_dim=VALUE_DIM), LAYOUTS[0])
        num_bytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        for pair in range(arguments.pairs + 1):
            for side in ("convert", "cp"):
                os.sync()
                started = time.perf_counter()
                if side == "convert":
                    words = [sys.executable, "-c", CHILD, source, made, LAYOUTS[1], arguments.max_memory]
                    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                    peaks.append(int(said))
                else:
                    synced_copy(source, copy)
                # The first pair warms up.
                if pair:
                    times[side].append(time.perf_counter() - started)
                shutil.rmtree(made if side == "convert" else copy)
    speeds = {side: num_bytes / 2**20 / statistics.median(seconds) for side, seconds in times.items()}
    ratio = speeds["convert"] / speeds["cp"]
    for side, speed in speeds.items():
        print(f"{side:>8} {speed:8.0f} MiB/s   {speed / speeds['cp']:.2f} of cp")
    print(f"peak of resident memory above the level after imports: {max(peaks) / 2**30:.2f} GiB")
    figures = {
        "gib": num_bytes / 2**30,
        "layouts": LAYOUTS,
        "max_memory": arguments.max_memory,
        "mib_per_s": speeds,
        "convert_over_cp": ratio,
        "peak_gib": max(peaks) / 2**30,
        "samples": times,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
