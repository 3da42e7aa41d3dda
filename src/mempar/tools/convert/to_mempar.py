"""A source as a checkpoint of mempar's, in any layout: what that layout's ranks would have saved.

Tensors are read in bands of rows, each once, and every band is handed to the files of the ranks that save a part of it.
A table's files are known in length beforehand, and jobs write their row blocks in place. Dense tensors are serialised
one after the other: every job makes a file of its own for each rank.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.block_writer import BlockWriter, aligned_empty, write_at
from mempar.runtime.checkpoint.describing import describe
from mempar.runtime.checkpoint.holdings import dense_shares, object_rank, table_of, table_shares
from mempar.runtime.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    FileRecord,
    Manifest,
    TensorRecord,
    checksum,
    damaged,
    decode_piece,
    encode_piece,
)
from mempar.runtime.checkpoint.names import canonical, is_optimizer_state, kept_names
from mempar.runtime.checkpoint.shard_file import ShardFile
from mempar.runtime.checkpoint.torch_dist import RankFile
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import sync
from mempar.runtime.placement import Placement, place
from mempar.tools.convert.bands import Span, band_box, bands, blocks_of, part_of, shaped, spread
from mempar.tools.convert.megatron_common import common_of
from mempar.tools.convert.plan import Advance, Job, Plan
from mempar.tools.convert.source import Source

# Of a job: little enough to be done again after a crash, much enough that jobs cost nothing.
_JOB_BYTES = 512 << 20
# Of a table that has as many row blocks, so that workers end at about the same time.
_LEAST_JOBS = 16
# Copies of a band of a dense tensor that there are at a time: the band, a part of it in order, what is serialised.
_COPIES = 3
# Headers, small files and what a file system keeps for itself, in bytes a file.
_SPARE_BYTES = 4096


class ToMempar:
    """A conversion to a checkpoint of mempar's."""

    def __init__(self, source: Source, run: RunConfig, world: int) -> None:
        """Lay it out.

        Args:
            source: where tensors come from.
            run: the resolved run, in the layout that is wanted.
            world: its ranks.

        Raises:
            ConfigError: when the layout does not fit the run.
            CheckpointError: when the source is damaged.
        """
        self.source, self.run, self.world = source, run, world
        self.placement: Placement = place(run, world)
        dtypes = {name: record.dtype for name, record in source.tensors.items()}
        # Under which name the source has what the checkpoint will have.
        self.names = kept_names(dtypes, distributed=run.parallel.distributed_optimizer)
        self.tensors: Mapping[str, TensorRecord] = {
            name: replace(
                source.tensors[there], kind=OPTIMIZER if is_optimizer_state(name) else source.tensors[there].kind
            )
            for name, there in self.names.items()
        }
        self.megatron = source.megatron()
        self.common = self._common()
        self.shards: dict[str, ShardFile] = {}

    def plan(self, memory_bytes: int) -> Plan:
        """Plan it.

        Args:
            memory_bytes: that a job may take.

        Raises:
            CheckpointError: when the source has what the run has not.
        """
        for key in self.megatron.objects if self.megatron is not None else ():
            object_rank(key, self.run, self.placement.grid)
        jobs = list(self._table_jobs()) + list(self._dense_jobs(memory_bytes))
        sizes = ", ".join(f"{name}={size}" for name, size in self.placement.grid.sizes.items() if size > 1)
        kind = "distributed" if self.run.parallel.distributed_optimizer else "plain"
        return Plan(
            what=f"a checkpoint for {self.world} rank(s) ({sizes or 'a single one'}; {kind} optimizer)",
            jobs=jobs,
            prepare=self._prepare,
            finish=self._finish,
        )

    def _common(self) -> bytes:
        try:
            return bytes(torch_dist.saved(common_of(self.megatron, self.run, self.tensors)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            path = self.source.root / torch_dist.DIRECTORY / "common.pt"
            raise damaged(path, f"it is not what megatron saves ({type(error).__name__})") from None

    def _table_jobs(self) -> Iterator[Job]:
        for name, record in self.tensors.items():
            if table_of(name, self.run) is None:
                continue
            shares = [
                (rank, share, rows)
                for rank, (share, rows) in table_shares(name, record, self.run, self.placement).items()
            ]
            self.shards |= {shard_file.path_of(share): ShardFile(share) for _, share, _ in shares}
            block = shares[0][2]
            whole = Span(name=name, record=record, first=0, last=record.shape[0], shares=shares)
            job_bytes = min(_JOB_BYTES, whole.num_bytes // _LEAST_JOBS)
            rows = max(1, job_bytes // max(1, block * whole.row_bytes)) * block
            for first in spread(range(0, whole.last, rows), self.placement.grid.mp_rows):
                span = replace(whole, first=first, last=min(whole.last, first + rows))
                yield self._job(f"{name} {first} {span.last}", [span], min(block, span.last - first))

    def _dense_jobs(self, memory_bytes: int) -> Iterator[Job]:
        waiting: list[Span] = []
        number = itertools.count()
        for name, record in self.tensors.items():
            if table_of(name, self.run) is not None:
                continue
            shares = [
                (rank, share, 0)
                for rank, boxes in dense_shares(name, record, self.run, self.placement.grid).items()
                for share in boxes
            ]
            whole = Span(name=name, record=record, first=0, last=(record.shape or (1,))[0], shares=shares)
            for first, last in bands(
                self.source.cuts(self.names[name]), whole.row_bytes, memory_bytes // (2 * _COPIES)
            ):
                waiting.append(replace(whole, first=first, last=last))
                if sum(span.num_bytes for span in waiting) >= _JOB_BYTES:
                    yield self._dense_job(next(number), waiting)
                    waiting = []
        if waiting:
            yield self._dense_job(next(number), waiting)

    def _dense_job(self, number: int, spans: list[Span]) -> Job:
        # All of it: how much goes into a job depends on the memory there is.
        rows = " ".join(f"{span.name}:{span.first}-{span.last}" for span in spans)
        return self._job(f"dense {number} {checksum(rows.encode())}", spans)

    def _job(self, key: str, spans: list[Span], band_rows: int = 0) -> Job:
        num_bytes = sum(span.num_bytes for span in spans)
        peak = max(self._peak(span, band_rows) for span in spans)
        files = len({rank for span in spans for rank, _, _ in span.shares})

        def run(directory: Path, advance: Advance) -> Any:
            if band_rows:
                return self._write_table(directory, spans[0], band_rows, advance)
            return self._write_dense(directory, int(key.split()[1]), spans, advance)

        return Job(
            key=key,
            bytes_read=num_bytes,
            bytes_written=num_bytes + _SPARE_BYTES * files,
            memory_bytes=peak,
            run=run,
        )

    def _peak(self, span: Span, band_rows: int) -> int:
        """Bytes of memory that a band takes: itself, what is copied of it on the way out, what the source keeps."""
        name = self.names[span.name]
        if not band_rows:
            # Reading is over when it is written.
            return span.num_bytes + max(self.source.memory_bytes(name, at_cuts=True), (_COPIES - 1) * span.num_bytes)
        at_cuts = set(range(span.first, span.last, band_rows)) <= set(self.source.cuts(name))
        reading = self.source.memory_bytes(name, at_cuts=at_cuts)
        widths = (share.sizes[1] if len(share.sizes) > 1 else 0 for _, share, _ in span.shares)
        copied = max((width for width in widths if width < prod(span.record.shape[1:])), default=0)
        return band_rows * (span.row_bytes + copied * getattr(torch, span.record.dtype).itemsize) + reading

    def _prepare(self, directory: Path) -> None:
        """Make the files of tables, in their length: what has no block yet takes no room."""
        for path, shard in self.shards.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            file = os.open(directory / path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(file, shard.num_bytes)
                write_at(file, shard.header, 0)
            finally:
                os.close(file)
        # What the journal says is done must have its name after a crash of the machine, too.
        for path, _, _ in os.walk(directory):
            sync(Path(path))

    def _write_table(self, directory: Path, span: Span, band_rows: int, advance: Advance) -> Any:
        """Write the row blocks of a range of rows; the result has pieces by file, and the range's digest."""
        pieces: dict[str, list[Any]] = {}
        digest = 0
        dtype = getattr(torch, span.record.dtype)
        room, room_of_part = (aligned_empty(band_rows * span.row_bytes) for _ in range(2))
        with ExitStack() as stack:
            rows = stack.enter_context(self.source.stream(self.names[span.name], span.first, span.last))
            files: dict[str, BlockWriter] = {}
            for first in range(span.first, span.last, band_rows):
                band = band_box(span, first, min(span.last, first + band_rows))
                numbers = shaped(room, band.sizes, dtype)
                rows.read(numbers)
                for _, share, block_rows in span.shares:
                    shard = self.shards[shard_file.path_of(share)]
                    for block in blocks_of(share, band, block_rows):
                        if shard.path not in files:
                            files[shard.path] = BlockWriter(directory / shard.path)
                            stack.callback(files[shard.path].close)
                        part = part_of(numbers, band, block)
                        if not part.is_contiguous():
                            part = shaped(room_of_part, block.sizes, dtype).copy_(part)
                        piece, part_digest = shard.piece_of(block, part)
                        files[shard.path].write(part, piece.start)
                        pieces.setdefault(shard.path, []).append(encode_piece(piece))
                        digest += part_digest
                        advance(piece.num_bytes)
            for file in files.values():
                file.sync()
        return {"pieces": pieces, "digests": {span.name: digest % 2**64}}

    def _write_dense(self, directory: Path, number: int, spans: list[Span], advance: Advance) -> Any:
        """Write a file for every rank that saves a part of these tensors."""
        digests: dict[str, int] = {}
        with ExitStack() as stack:
            files: dict[int, RankFile] = {}

            def file_of(rank: int) -> RankFile:
                if rank not in files:
                    path = torch_dist.path_of(rank, number)
                    # What an earlier attempt left.
                    (directory / path).unlink(missing_ok=True)
                    files[rank] = stack.enter_context(RankFile(directory, path))
                return files[rank]

            if number == 0 and self.megatron is not None:
                for key, data in self.megatron.objects.items():
                    file_of(object_rank(key, self.run, self.placement.grid)).add_object(key, data)
            for span in spans:
                band = band_box(span, span.first, span.last)
                numbers = torch.empty(band.sizes, dtype=getattr(torch, band.dtype))
                if band.shape:
                    with self.source.stream(self.names[span.name], span.first, span.last) as rows:
                        rows.read(numbers)
                else:
                    self.source.read(replace(band, name=self.names[span.name]), numbers)
                for rank, share, _ in span.shares:
                    itemsize, block_bytes = numbers.element_size(), self.run.checkpoint.block_bytes
                    for part in blocks_of(share, band, torch_dist.rows_of(share, itemsize, block_bytes)):
                        digest = file_of(rank).add_tensor(
                            part, part_of(numbers, band, part).clone(memory_format=torch.contiguous_format)
                        )
                        digests[span.name] = (digests.get(span.name, 0) + digest) % 2**64
                advance(span.num_bytes)
        records = [file.record for file in files.values()]
        for record in records:
            sync(directory / record.path)
        sync(directory / torch_dist.DIRECTORY)
        pieces = {record.path: [encode_piece(piece) for piece in record.pieces] for record in records}
        return {"pieces": pieces, "digests": digests}

    def _finish(self, directory: Path, results: dict[str, Any]) -> None:
        """Check that what was written is what was read, and describe it."""
        pieces: dict[str, list[Any]] = {path: [] for path in self.shards}
        digests: dict[str, int] = {}
        for result in results.values():
            for path, found in result["pieces"].items():
                pieces.setdefault(path, []).extend(found)
            for name, digest in result["digests"].items():
                digests[name] = (digests.get(name, 0) + digest) % 2**64
        tensors = {name: replace(record, digest=digests[name]) for name, record in self.tensors.items()}
        self._check_digests(tensors)
        files = [self._record(path, found) for path, found in sorted(pieces.items())]
        for path in (CONFIG, MANIFEST, *torch_dist.DESCRIPTION):
            (directory / path).unlink(missing_ok=True)
        describe(
            directory,
            Manifest(
                root=directory,
                progress=self.source.progress,
                about={**self.source.about, "layout": self.placement.grid.sizes},
                tensors=tensors,
                files={record.path: record for record in files},
            ),
            self.run,
            self.common,
        )

    def _record(self, path: str, found: list[Any]) -> FileRecord:
        shard = self.shards.get(path)
        if shard is None:
            decoded, start = [], 0
            for entry in found:
                decoded.append(decode_piece(entry, start, self.tensors))
                start += decoded[-1].num_bytes
            return FileRecord(path=path, pieces=tuple(decoded))
        # Blocks come from several jobs.
        decoded, start = [shard.head], len(shard.header)
        for entry in sorted(found, key=lambda entry: entry[3]):
            decoded.append(decode_piece(entry, start, self.tensors))
            start += decoded[-1].num_bytes
        return FileRecord(path=path, pieces=tuple(decoded))

    def _check_digests(self, tensors: Mapping[str, TensorRecord]) -> None:
        if not self.source.has_digests:
            return
        of_source = {canonical(name): record for name, record in self.source.tensors.items()}
        for name, record in tensors.items():
            before = of_source.get(canonical(name))
            if before is not None and before.digest != record.digest:
                raise CheckpointError(
                    f"{name} has another digest than in {self.source.root}; a conversion changes no number; the source "
                    "was changed while it was read, or its manifest is wrong: look at it with `mempar verify`."
                )
