"""A model of ours as a directory that transformers loads: weights alone, one job a file.

Dense tensors are read once, some rows at a time, and written to the places of the tensors that they are parts of.
Tables are cut into blocks of rows, one a file. Digests of what was read are compared with the source's, and go along
for the way back.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mempar.errors import CheckpointError
from mempar.memory.digest import digest_box
from mempar.runtime.checkpoint.boxes import Box, row_blocks
from mempar.runtime.checkpoint.manifest import WEIGHTS, checksum, damaged
from mempar.runtime.durable import replace_file
from mempar.tools.convert.hf import model_files
from mempar.tools.convert.hf.kept_settings import KeptSettings, kept_settings
from mempar.tools.convert.hf.safetensors_file import FileLayout, lay_out, write_numbers, writing
from mempar.tools.convert.hf.tensor_names import EMBEDDING, HfTensor, dense_tensors, rows_name, table_shapes
from mempar.tools.convert.hf.tokenizer_files import TokenizerFiles, tokenizer_files
from mempar.tools.convert.plan import Advance, Job, Plan
from mempar.tools.convert.source import Source

WEIGHTS_INDEX, TABLES_INDEX = "model.safetensors.index.json", "tables.safetensors.index.json"
# Digests of our tensors, and the tag by which the files that they are of are known.
DIGESTS, TAG = "mempar_digests.json", "mempar"
MAX_SHARD_BYTES = 4 << 30
# Bytes of a tensor that are held at a time, where memory allows.
_CHUNK_BYTES = 1 << 26


def plan_hf(source: Source, *, memory_bytes: int, max_shard_bytes: int = MAX_SHARD_BYTES, tokenizer: str = "") -> Plan:
    """Plan the export of a model.

    Args:
        source: the model; what is no weight of it is left out.
        memory_bytes: that one job may take.
        max_shard_bytes: of one file, if no single tensor is larger.
        tokenizer: as in `data.tokenizer`; by default the run's own.

    Raises:
        CheckpointError: when the source holds other weights than its settings say.
        ConfigError: for a tokenizer of an unknown kind.
    """
    dense = _checked_tensors(source)
    shards = _Shards(source, checksum(f"{source.identity} {max_shard_bytes}".encode()), memory_bytes)
    jobs = shards.dense_jobs(dense, max_shard_bytes) + shards.table_jobs(max_shard_bytes)
    text = tokenizer_files(tokenizer or source.run.data.tokenizer, source.run.train.seq_length)
    if text.eod is not None and text.eod >= source.tensors[EMBEDDING].shape[0]:
        # A model that knows no such token never ends a document.
        text = replace(text, eod=None)
    kept = kept_settings(source.about, source.tensors[EMBEDDING].shape[0], tokens=not tokenizer)
    what = "a Llama of transformers'" if model_files.is_llama(source.run) else "a model of transformers'"
    return Plan(
        what=f"{what} in {len(jobs)} files" + (f". {text.note}" if text.note else ""),
        jobs=jobs,
        prepare=lambda directory: directory.mkdir(parents=True, exist_ok=True),
        finish=partial(_finish, source, shards, text, kept),
    )


def _checked_tensors(source: Source) -> list[HfTensor]:
    held = {name: record.shape for name, record in source.tensors.items() if record.kind == WEIGHTS}
    embedding = held.get(EMBEDDING, (0,))
    tensors = dense_tensors(source.run, embedding[0])
    wanted = {tensor.logical: tensor.pieces[0].shape for tensor in tensors} | table_shapes(source.run)
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            there, here = (str(list(found[name])) if name in found else "absent" for found in (held, wanted))
            raise CheckpointError(
                f"{source.root} holds weights that its settings do not: {name} is {there}, but {here} by its config; "
                "a model is exported whole or not at all; convert it with the mempar that wrote it."
            )
    return tensors


class _Shards:
    """The files of an export, as jobs, and what they hold together."""

    def __init__(self, source: Source, tag: str, memory_bytes: int) -> None:
        self.source, self.tag = source, tag
        self.chunk_bytes = max(1, min(_CHUNK_BYTES, memory_bytes // 2))
        # Files by the names of the tensors in them, for both indices.
        self.dense: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        # Of the numbers in a file, by its name.
        self.num_bytes: dict[str, int] = {}
        self.num_params = 0

    def dense_jobs(self, tensors: list[HfTensor], max_bytes: int) -> list[Job]:
        """The jobs of all dense tensors; parts of one of ours are in one file."""
        groups: dict[str, list[HfTensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.logical, []).append(tensor)
        files: list[list[str]] = [[]]
        size = 0
        for name in groups:
            num_bytes = self._num_bytes(name)
            if files[-1] and size + num_bytes > max_bytes:
                files.append([])
                size = 0
            files[-1].append(name)
            size += num_bytes
        jobs = []
        for place, names in enumerate(files):
            path = f"model-{place + 1:05d}-of-{len(files):05d}.safetensors"
            parts = [tensor for name in names for tensor in groups[name]]
            dtypes = self.source.tensors
            layout = self._layout(path, [(part.name, dtypes[part.logical].dtype, part.shape) for part in parts])
            self.dense |= {part.name: path for part in parts}
            jobs.append(self._job(layout, names, partial(self._write_dense, layout, {n: groups[n] for n in names})))
        return jobs

    def table_jobs(self, max_bytes: int) -> list[Job]:
        """The jobs of all tables, each of whose files holds one block of rows."""
        jobs = []
        for name in table_shapes(self.source.run):
            record = self.source.tensors[name]
            rows, width = record.shape
            cuts = _row_cuts(self.source.cuts(name), rows, max(1, max_bytes // (self._num_bytes(name) // rows)))
            for place, (first, last) in enumerate(itertools.pairwise(cuts)):
                path = f"tables-{name}-{place + 1:05d}-of-{len(cuts) - 1:05d}.safetensors"
                block = rows_name(name, first)
                layout = self._layout(path, [(block, record.dtype, (last - first, width))])
                self.tables[block] = path
                jobs.append(self._job(layout, [name], partial(self._write_rows, layout, name, first, last)))
        return jobs

    def _num_bytes(self, name: str) -> int:
        record = self.source.tensors[name]
        return math.prod(record.shape) * getattr(torch, record.dtype).itemsize

    def _layout(self, path: str, tensors: list[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
        self.num_params += sum(math.prod(shape) for _, _, shape in tensors)
        layout = lay_out(Path(path), tensors, {TAG: self.tag})
        self.num_bytes[path] = layout.num_bytes - len(layout.header)
        return layout

    def _job(self, layout: FileLayout, names: list[str], run: Callable[[Path, Advance], Any]) -> Job:
        rows = (self._num_bytes(name) // self.source.tensors[name].shape[0] for name in names)
        chunk = max(self.chunk_bytes, *rows)
        return Job(
            key=str(layout.path),
            bytes_read=layout.num_bytes - len(layout.header),
            bytes_written=layout.num_bytes,
            memory_bytes=chunk + max(self.source.memory_bytes(name) for name in names),
            run=run,
        )

    def _chunks(self, box: Box) -> list[Box]:
        row_bytes = max(1, self._num_bytes(box.name) // max(1, box.shape[0]))
        return list(row_blocks(box, max(1, self.chunk_bytes // row_bytes)))

    def _whole(self, name: str) -> Box:
        record = self.source.tensors[name]
        zeros = (0,) * len(record.shape)
        return Box(name=name, dtype=record.dtype, shape=record.shape, offset=zeros, sizes=record.shape)

    def _write_dense(
        self, layout: FileLayout, groups: dict[str, list[HfTensor]], directory: Path, advance: Advance
    ) -> dict[str, str]:
        digests = dict.fromkeys(groups, 0)
        with writing(directory, layout) as file:
            advance(len(layout.header))
            for name, parts in groups.items():
                for chunk in self._chunks(self._whole(name)):
                    numbers = torch.empty(chunk.sizes, dtype=getattr(torch, chunk.dtype))
                    self.source.read(chunk, numbers)
                    digests[name] += int(digest_box(name, numbers, chunk.offset, chunk.shape))
                    for part in parts:
                        advance(_write_pieces(file, layout, part, chunk, numbers))
        return _hexadecimal(digests)

    def _write_rows(
        self, layout: FileLayout, name: str, first: int, last: int, directory: Path, advance: Advance
    ) -> dict[str, str]:
        total, whole = 0, self._whole(name)
        entry = layout.entries[rows_name(name, first)]
        rows = replace(whole, offset=(first, 0), sizes=(last - first, whole.shape[1]))
        with writing(directory, layout) as file, self.source.stream(name, first, last) as stream:
            advance(len(layout.header))
            for chunk in self._chunks(rows):
                numbers = torch.empty(chunk.sizes, dtype=getattr(torch, chunk.dtype))
                stream.read(numbers)
                total += int(digest_box(name, numbers, chunk.offset, chunk.shape))
                advance(write_numbers(file, entry, (chunk.offset[0] - first) * chunk.sizes[1], numbers))
        return _hexadecimal({name: total})


def _write_pieces(file: int, layout: FileLayout, tensor: HfTensor, chunk: Box, numbers: torch.Tensor) -> int:
    """Write what a chunk of one of our tensors holds of one of theirs; returns the bytes written."""
    written, begin = 0, 0
    for piece in tensor.pieces:
        places = chunk.overlap(piece)
        if places is not None:
            mine, theirs = places
            # A chunk has whole rows, so that what it holds of a piece lies together in it.
            place = 0
            for part, size in zip(theirs, piece.sizes, strict=True):
                place = place * size + part.start
            written += write_numbers(file, layout.entries[tensor.name], begin + place, numbers[mine])
        begin += piece.num_elements
    return written


def _row_cuts(cuts: list[int], rows: int, most: int) -> list[int]:
    """Cut rows into blocks of at most so many, at the source's own cuts where these are near."""
    found = [0]
    while found[-1] < rows:
        end = min(rows, found[-1] + most)
        near = [cut for cut in cuts if found[-1] + most // 2 < cut <= end] if end < rows else []
        found.append(max(near, default=end))
    return found


def _hexadecimal(digests: dict[str, int]) -> dict[str, str]:
    return {name: f"{number % 2**64:016x}" for name, number in digests.items()}


def _finish(
    source: Source,
    shards: _Shards,
    text: TokenizerFiles,
    kept: KeptSettings,
    directory: Path,
    results: dict[str, dict[str, str]],
) -> None:
    digests: dict[str, int] = {}
    for found in results.values():
        for name, number in found.items():
            digests[name] = (digests.get(name, 0) + int(number, 16)) % 2**64
    if source.has_digests:
        changed = [name for name, number in digests.items() if number != source.tensors[name].digest]
        if changed:
            raise damaged(source.root, f"{', '.join(changed)} changed while being read, or are not what was saved")
    run, rows, dtype = source.run, source.tensors[EMBEDDING].shape[0], source.tensors[EMBEDDING].dtype
    progress = {name: count for name, count in source.progress.items() if type(count) is int}
    files = {
        WEIGHTS_INDEX: _index(shards.dense, shards.num_bytes),
        model_files.CONFIG: model_files.model_config(run, rows, dtype, text.eod, progress, kept),
        model_files.GENERATION_CONFIG: model_files.generation_config(text.eod, text.vocab_size, rows, kept),
        model_files.CARD: model_files.model_card(run, shards.num_params, text),
        DIGESTS: json.dumps({"tag": shards.tag, "digests": _hexadecimal(digests)}, indent=1).encode(),
        **text.files,
    }
    if shards.tables:
        files[TABLES_INDEX] = _index(shards.tables, shards.num_bytes)
    if not model_files.is_llama(run):
        files[model_files.MODELING] = Path(__file__).with_name(model_files.MODELING).read_bytes()
    for name, content in files.items():
        replace_file(directory / name, content)


def _index(places: dict[str, str], num_bytes: dict[str, int]) -> bytes:
    total = sum(num_bytes[path] for path in set(places.values()))
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n").encode()
