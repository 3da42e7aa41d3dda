"""Writing a checkpoint: every rank its own parts, at once or beside training, and then all of it or nothing.

1. Every rank says which parts of which tensors it would write; the main rank checks that they make up whole
   tensors and that there is room. Nothing has been written so far.
2. Ranks write their files into `step_XXXXXXXX.partial`, computing checksums and digests on the way. No rank
   waits for another one, and no number of a table moves between ranks. They write in a thread: beside training
   if the save is asynchronous, from a copy in host memory, or else while the ranks wait for each other.
3. When all ranks have written, the main rank adds what describes the checkpoint, the manifest last, and gives
   the directory its name.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mempar.errors import MemparError
from mempar.runtime.bringup import World
from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.boxes import Box, check_coverage
from mempar.runtime.checkpoint.describing import describe
from mempar.runtime.checkpoint.manifest import OPTIMIZER, WEIGHTS, FileRecord, Manifest, TensorRecord
from mempar.runtime.checkpoint.names import is_optimizer_state
from mempar.runtime.checkpoint.parts import Parts, collect_parts
from mempar.runtime.checkpoint.retention import PARTIAL, remove_leftovers, replace_directory
from mempar.runtime.checkpoint.together import as_told, on_main, raise_together, wait_for_all
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import sync
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is whole.

    Attributes:
        path: its directory.
        num_bytes: its size.
        seconds: from the beginning of the save to its end.
        waited_seconds: of these, how long training waited.
    """

    path: Path
    num_bytes: int
    seconds: float
    waited_seconds: float


@dataclass(kw_only=True)
class _Written:
    """What one rank has written."""

    files: list[FileRecord] = field(default_factory=list)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    error: str = ""

    def add(self, name: str, like: Box | TensorRecord, kind: str, digest: int) -> None:
        before = self.tensors[name].digest if name in self.tensors else 0
        self.tensors[name] = TensorRecord(
            dtype=like.dtype, shape=like.shape, kind=kind, digest=(before + digest) % 2**64
        )


class Save:
    """One checkpoint in the making on one rank; made and finished by all ranks together."""

    def __init__(
        self, path: Path, run: RunConfig, world: World, model: Model, optimizers: Optimizers, meta: dict[str, Any]
    ) -> None:
        """Check that it can be written, and begin to write it.

        Args:
            path: its directory; replaced if it exists.
            run: written into the checkpoint.
            world: the ranks.
            model: parameters and tables.
            optimizers: moments and step counts.
            meta: what else is needed to continue: `progress` and more, see `Manifest`.

        Raises:
            MemparError: on every rank, when it cannot; nothing is left behind.
        """
        self.path, self.run, self.world, self.meta = path, run, world, meta
        self.partial = path.with_name(path.name + PARTIAL)
        self.started = time.monotonic()
        self.written = _Written()
        parts, failure = self._try(lambda: collect_parts(run, world, model, optimizers))
        raise_together(world, failure)
        on_main(world, (parts.boxes, parts.num_bytes), self._make_room)
        if run.checkpoint.asynchronous:
            # A rank that has no room for it writes nothing, and the others hear of it when they finish.
            parts, failure = self._try(lambda: parts.copied(run))
            if failure is not None:
                self.written.error = f"rank {world.rank} cannot copy its parts: {failure}"
        self.common = parts.common if parts is not None else b""
        self.thread = threading.Thread(target=self._write, args=(parts,), name="checkpoint")
        self.thread.start()
        self.waited_seconds = time.monotonic() - self.started

    @property
    def has_written(self) -> bool:
        """Whether this rank has written its files."""
        return not self.thread.is_alive()

    def finish(self) -> Saved:
        """Wait until all ranks have written, and give the checkpoint its name; every rank must call it.

        Raises:
            MemparError: on every rank, when one of them could not write; nothing is left behind.
        """
        began = time.monotonic()
        wait_for_all(self.world, lambda: self.has_written)
        num_bytes = on_main(self.world, self.written, self._complete)
        return Saved(
            path=self.path,
            num_bytes=num_bytes,
            seconds=time.monotonic() - self.started,
            waited_seconds=self.waited_seconds + time.monotonic() - began,
        )

    @staticmethod
    def _try(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return work(), None
        # Whatever it is, the other ranks wait to hear of it.
        except Exception as error:
            return None, error

    def _make_room(self, of_ranks: list[tuple[list[Box], int]]) -> None:
        check_coverage([(box, rank) for rank, (boxes, _) in enumerate(of_ranks) for box in boxes])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent, but_must=self.partial)
            needed, free = sum(num_bytes for _, num_bytes in of_ranks), shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise MemparError(
                    f"{self.path} needs {needed / 2**20:.1f} MiB and {self.path.parent} has {free / 2**20:.1f} MiB "
                    "left; nothing was written, the checkpoints before are intact; make room, or lower "
                    "train.keep_checkpoints, and continue with --resume."
                )
            self.partial.mkdir()
        except OSError as error:
            raise _not_written(self.path, f"{error}; see to the disk") from None

    def _write(self, parts: Parts | None) -> None:
        """Write this rank's files, in a thread of its own."""
        if parts is None:
            return
        # Threads of one thread each: teams of them would wait for each other, and for those of training.
        torch.set_num_threads(1)
        threads = self.run.checkpoint.threads
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for kind, box, tensor, block_rows in parts.shards:
                    record, digest = shard_file.write_shard_file(self.partial, box, tensor, block_rows, pool.map)
                    self.written.files.append(record)
                    self.written.add(box.name, box, kind, digest)
            rank_file, digests = torch_dist.write_rank_file(
                self.partial, self.world.rank, parts.dense, parts.objects, self.run.checkpoint.block_bytes
            )
            if rank_file is not None:
                self.written.files.append(rank_file)
            # All at the end: the kernel has been writing while later files were made.
            for record in self.written.files:
                sync(self.partial / record.path)
            boxes = {box.name: box for box, _ in parts.dense}
            for name, digest in digests.items():
                self.written.add(name, boxes[name], OPTIMIZER if is_optimizer_state(name) else WEIGHTS, digest)
        except OSError as error:
            self.written.error = f"rank {self.world.rank}: {error}; see to the disk"
        # Whatever it is, the other ranks wait to hear of it.
        except Exception as error:
            self.written.error = str(as_told(self.world, error))

    def _complete(self, of_ranks: list[_Written]) -> int:
        errors = [written.error for written in of_ranks if written.error]
        try:
            if errors:
                raise _not_written(self.path, errors[0])
            num_bytes = self._describe(of_ranks)
            replace_directory(self.partial, self.path)
            return num_bytes
        except OSError as error:
            raise _not_written(self.path, f"{error}; see to the disk") from None
        finally:
            # It has another name by then if all went well.
            shutil.rmtree(self.partial, ignore_errors=True)

    def _describe(self, of_ranks: list[_Written]) -> int:
        files = [record for written in of_ranks for record in written.files]
        totals = _Written()
        for written in of_ranks:
            for name, record in written.tensors.items():
                totals.add(name, record, record.kind, record.digest)
        manifest = Manifest(
            root=self.path,
            progress=self.meta["progress"],
            about={
                **{key: value for key, value in self.meta.items() if key != "progress"},
                "layout": self.world.placement.grid.sizes,
            },
            tensors=totals.tensors,
            files={record.path: record for record in files},
        )
        return describe(self.partial, manifest, self.run, self.common).num_bytes


def _not_written(path: Path, why: str) -> MemparError:
    return MemparError(
        f"{path} cannot be written: {why}; a checkpoint is written whole or not at all, so nothing of it is left and "
        "those before it are intact; continue with --resume."
    )
