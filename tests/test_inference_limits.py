"""Tables larger than the memory that a process may take: the model reads them from their files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from byte_models import byte_run, save_byte_model
from mempar.runtime.checkpoint.boxes import row_blocks
from mempar.runtime.checkpoint.manifest import Piece, encode_piece
from mempar.tools.convert.bands import Span
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.to_mempar import ToMempar
from mempar.tools.convert.with_memory import WithMemory
from rank_pool import RankPool

NUM_SUBKEYS, WIDTH = 5120, 24
TABLE_BYTES = NUM_SUBKEYS**2 * WIDTH * 4
LIMIT_BYTES = TABLE_BYTES // 2
GENERATES = """
import sys
from pathlib import Path
import torch
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.generation import generate
from mempar.runtime.inference.opened import open_model

with open_model(find_checkpoint(Path(sys.argv[1]))) as opened:
    (found,) = generate(opened.forward, [list(b"a prompt")], max_new_tokens=12)
    print(opened.tables, len(found))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["RssAnon"].split()[0]) << 10)
try:
    torch.empty(int(sys.argv[2]), dtype=torch.uint8)
except RuntimeError:
    print("the limit holds")
"""
IS_REFUSED = """
import sys
from pathlib import Path
from mempar.errors import ConfigError
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.opened import open_model

try:
    with open_model(find_checkpoint(Path(sys.argv[1])), tables="memory"):
        pass
except ConfigError as error:
    print(error)
"""


def with_large_table(saved: Path, root: Path) -> None:
    """A dense checkpoint with a memory whose table is all zeros, which take no room on the disk."""
    memory = {"num_subkeys": NUM_SUBKEYS, "layers": "[1,2]", "heads": 2, "top_k": 8, "key_dim": 16}
    source = WithMemory(CheckpointSource(saved), [f"memory.{name}={value}" for name, value in memory.items()])
    writer = Unwritten(source, source.run, 1)
    plan = writer.plan(1 << 24)
    root.mkdir()
    plan.prepare(root)
    plan.finish(root, {job.key: job.run(root, lambda num_bytes: None) for job in plan.jobs})


class Unwritten(ToMempar):
    """Describes the rows of tables and leaves them as they are."""

    def _write_table(self, directory: Path, span: Span, band_rows: int, advance: Any) -> Any:
        ((_, share, block_rows),) = span.shares
        (shard,) = self.shards.values()
        rows = replace(share, offset=(span.first, 0), sizes=(span.last - span.first, share.sizes[1]))
        pieces = [
            Piece(
                start=len(shard.header) + block.offset[0] * shard.row_bytes,
                num_bytes=block.sizes[0] * shard.row_bytes,
                checksum="0" * 32,
                box=block,
            )
            for block in row_blocks(rows, block_rows)
        ]
        return {"pieces": {shard.path: [encode_piece(piece) for piece in pieces]}, "digests": {span.name: 0}}


def test_table_larger_than_memory_generates(pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, save_byte_model, byte_run(kind="dense"), tmp_path / "dense")
    with_large_table(tmp_path / "dense", tmp_path / "large")
    (table,) = (tmp_path / "large" / "tables" / "memory.values").iterdir()
    assert table.stat().st_size > TABLE_BYTES
    found, anonymous, held = limited(GENERATES, tmp_path / "large")
    assert (found, held) == ("mapped 12", "the limit holds")
    assert int(anonymous) < LIMIT_BYTES < TABLE_BYTES
    (refused,) = limited(IS_REFUSED, tmp_path / "large")
    assert f"not memory enough for {tmp_path / 'large'} ({TABLE_BYTES} bytes more were wanted)" in refused


def limited(program: str, checkpoint: Path) -> list[str]:
    """The lines that a program prints whose anonymous memory is limited to less than the table takes."""
    command = ["bash", "-c", 'ulimit -d "$1" && shift && exec "$@"', "bash", str(LIMIT_BYTES >> 10)]
    command += [sys.executable, "-c", program, str(checkpoint), str(LIMIT_BYTES)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()
