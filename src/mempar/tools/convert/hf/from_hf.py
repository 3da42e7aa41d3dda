"""A directory of transformers' as a source: an export of ours, or a plain Llama.

It is untrusted: names of files stay in the directory, shapes are those that the settings ask for, types are known, and
nothing is unpickled. Numbers are read at the places where they are wanted; of a half-precision model (float16), which
our engine has not, they come as float32, the same numbers.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import WEIGHTS, TensorRecord, checksum
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import from_mapping
from mempar.tools.convert.hf.hf_files import ModelFiles, Place
from mempar.tools.convert.hf.kept_settings import settings_to_keep
from mempar.tools.convert.hf.llama_config import check_settings, llama_run
from mempar.tools.convert.hf.model_files import OURS
from mempar.tools.convert.hf.safetensors_file import CHUNK_BYTES, read_numbers
from mempar.tools.convert.hf.tensor_names import (
    HF_EMBEDDING,
    HF_OUTPUT,
    HfTensor,
    dense_tensors,
    parse_rows_name,
    rows_name,
    table_shapes,
)
from mempar.tools.convert.row_stream import box_rows
from mempar.tools.convert.source import RowStream

# Types of training, by those of numbers in files.
_TRAINED = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "bf16"}
_DTYPES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16"}
_WIDEST = ("float64", "float32", "float16", "bfloat16")
# What some Llamas carry along and nobody needs.
_IGNORED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A part of a logical tensor, and the elements of a file's tensor that hold it."""

    box: Box
    place: Place
    first_element: int


class HfSource:
    """See `Source`."""

    def __init__(self, root: Path) -> None:
        """Read what describes a model.

        Raises:
            CheckpointError: when it is none that our engine computes, or its files do not hold what it describes.
        """
        self.root = root
        files = ModelFiles(root)
        self.identity = checksum(files.identity.encode())
        described = files.config.get(OURS)
        dtype = _widest(files, [name for name in files.dense if parse_rows_name(name) is None])
        if described is None:
            _check_kind(root, files.config)
            _check_counts(root, files, files.config.get("num_hidden_layers"))
            self.run = llama_run(files.config, root, _TRAINED[dtype])
            self.progress: dict[str, Any] = {"step": 0, "applied_steps": 0}
        else:
            self.run, self.progress = _described(root, files, described)
            check_settings(files.config, root, self.run)
        self._pieces: dict[str, list[_Piece]] = {}
        self.run = _with_dtypes(self.run, _TRAINED[dtype], self._find_tables(files))
        self.about = settings_to_keep(files.config, files.generation, self._find_dense(files))
        self.has_digests = files.digests is not None and self._pieces.keys() <= files.digests.keys()
        self.tensors: Mapping[str, TensorRecord] = {
            name: TensorRecord(
                dtype=pieces[0].box.dtype,
                shape=pieces[0].box.shape,
                kind=WEIGHTS,
                digest=(files.digests or {}).get(name, 0),
            )
            for name, pieces in self._pieces.items()
        }

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        record = self.tensors.get(box.name)
        if record is None or (record.shape, record.dtype) != (box.shape, box.dtype):
            raise CheckpointError(
                f"{self.root} does not hold {box.name} as {box.dtype} {list(box.shape)}; a model is read as it is; use "
                "its settings."
            )
        for piece in self._pieces[box.name]:
            places = box.overlap(piece.box)
            if places is not None:
                _read_part(piece, places[1], target[places[0]])

    def stream(self, name: str, first: int, last: int) -> AbstractContextManager[RowStream]:
        """See `Source`."""
        return box_rows(self, name, first)

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        pieces = self._pieces[name]
        return sorted({0, pieces[0].box.shape[0], *(piece.box.offset[0] for piece in pieces)})

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """See `Source`."""
        return 2 * CHUNK_BYTES

    def megatron(self) -> None:
        """See `Source`."""

    def _find_dense(self, files: ModelFiles) -> int:
        """Find the parts of all tensors but tables; returns the rows of the embedding."""
        _check_sizes(self.root, files, self.run)
        rows = files.dense[HF_EMBEDDING].entry.shape[0]
        tensors = dense_tensors(self.run, rows)
        wanted = {tensor.name: tensor for tensor in tensors}
        _check_shapes(self.root, files, wanted, tied=self.run.model.tie_embeddings)
        if rows != self.run.model.padded_vocab(rows) or 0 < rows < self.run.model.vocab_size:
            raise CheckpointError(
                f"{self.root} has {rows} embeddings for model.vocab_size={self.run.model.vocab_size} in multiples of "
                f"{self.run.model.vocab_multiple}; every token needs one; mend config.json."
            )
        dtype = _DTYPES[self.run.train.dtype]
        for tensor in tensors:
            first = 0
            for piece in tensor.pieces:
                found = _Piece(box=replace(piece, dtype=dtype), place=files.dense[tensor.name], first_element=first)
                self._pieces.setdefault(piece.name, []).append(found)
                first += piece.num_elements
        return rows

    def _find_tables(self, files: ModelFiles) -> dict[str, str]:
        """Find the blocks of all tables; returns the tables' types, as a run has them."""
        known: dict[str, str] = {}
        shapes = table_shapes(self.run)
        blocks: dict[str, list[tuple[int, Place]]] = {name: [] for name in shapes}
        for name, place in files.tables.items():
            table, first = parse_rows_name(name) or ("", 0)
            if table not in blocks:
                raise _unlike(self.root, name, "absent", str(list(place.entry.shape)))
            blocks[table].append((first, place))
        for name, shape in shapes.items():
            at = 0
            known[name] = _TRAINED[_widest(files, [rows_name(name, first) for first, _ in blocks[name]])]
            for first, place in sorted(blocks[name], key=lambda block: block[0]):
                rows = place.entry.shape[0] if place.entry.shape else 0
                if first != at or place.entry.shape != (rows, shape[1]) or not 0 < rows <= shape[0] - at:
                    raise _unlike(self.root, rows_name(name, first), f"rows from {at} on of {list(shape)}", str(rows))
                box = Box(name=name, dtype=_DTYPES[known[name]], shape=shape, offset=(at, 0), sizes=(rows, shape[1]))
                self._pieces.setdefault(name, []).append(_Piece(box=box, place=place, first_element=0))
                at += rows
            if at != shape[0]:
                raise _unlike(self.root, name, f"{shape[0]} rows", f"{at} rows")
        return known


def _read_part(piece: _Piece, part: tuple[slice, ...], target: Tensor) -> None:
    """Fill a tensor with a part of a piece: rows of it at a time, whole ones, of which the columns are taken."""
    sizes = piece.box.sizes
    # Rows are along the first dimension of which the piece has more than one.
    dim = next((dim for dim, size in enumerate(sizes) if size > 1), len(sizes) - 1)
    width = prod(sizes[dim + 1 :])
    first, last = part[dim].start, part[dim].stop
    rows, columns = target.view(target.shape[dim:]) if dim else target, part[dim + 1 :]
    start = piece.first_element + first * width
    layout, name = piece.place.layout, piece.place.name
    if rows.is_contiguous() and all(cut == slice(0, size) for cut, size in zip(columns, sizes[dim + 1 :], strict=True)):
        read_numbers(layout, name, start, rows)
        return
    at_once = max(1, CHUNK_BYTES // max(1, width * target.element_size()))
    for begin in range(0, last - first, at_once):
        into = rows[begin : begin + at_once]
        whole = torch.empty((len(into), *sizes[dim + 1 :]), dtype=target.dtype)
        read_numbers(layout, name, start + begin * width, whole)
        into.copy_(whole[(slice(None), *columns)])


def _widest(files: ModelFiles, names: list[str]) -> str:
    """The widest type of some tensors; all are read as it."""
    places = [files.dense.get(name) or files.tables[name] for name in names]
    found = {place.entry.dtype for place in places}
    for place in places:
        if place.entry.dtype not in _TRAINED:
            raise CheckpointError(
                f"{place.layout.path} holds {place.name} in {place.entry.dtype}; models are trained in "
                f"{', '.join(_TRAINED)}; save it in one of these."
            )
    return next((dtype for dtype in _WIDEST if dtype in found), "float32")


def _with_dtypes(run: RunConfig, dtype: str, tables: dict[str, str]) -> RunConfig:
    """The run as it would be with numbers of these types, whatever types it had."""
    if dtype == run.train.dtype and all(
        tables[f"{name}.{kind}"] == run.table_dtype_of(memory)
        for name, memory in run.memories.items()
        for kind in memory.table_names
    ):
        return run
    cast = []
    for name, memory in run.memories.items():
        held = {tables[f"{name}.{kind}"] for kind in memory.table_names}
        own = "" if held == {dtype} else "float32" if "float32" in held else "bf16"
        rounding = memory.rounding if (own or dtype) == "bf16" else "master"
        cast.append(replace(memory, dtype=own, rounding=rounding))
    memories = {"memory": cast[0], "more_memories": tuple(cast[1:])} if cast else {}
    return replace(run, train=replace(run.train, dtype=dtype), **memories)


def _check_kind(root: Path, config: dict[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"{root / 'config.json'} has model_type={config.get('model_type')!r}; mempar reads what it exported "
            "itself, and plain Llamas (model_type llama); use one of these."
        )


def _described(root: Path, files: ModelFiles, described: Any) -> tuple[RunConfig, dict[str, Any]]:
    """The run and its progress as an export of ours has them."""
    path = root / "config.json"
    progress = described.get("progress") if isinstance(described, dict) else None
    if not isinstance(progress, dict) or not all(type(count) is int and count >= 0 for count in progress.values()):
        raise CheckpointError(
            f"{path} does not say how far the run was ({OURS}.progress); mempar wrote whole numbers there; export the "
            "model again."
        )
    run = described.get("run")
    model = run.get("model") if isinstance(run, dict) else None
    _check_counts(root, files, model.get("num_layers") if isinstance(model, dict) else None)
    return from_mapping(run, path), {"step": 0, "applied_steps": 0, **progress}


def _check_counts(root: Path, files: ModelFiles, layers: Any, experts: int = 1) -> None:
    """Check that a model has no more layers than tensors, before anything is done for each of them."""
    # What is no number is refused where settings are read.
    if isinstance(layers, int | float | str) and not (type(layers) is int and layers * experts <= len(files.dense)):
        wanted = f"{layers!r} layers" + (f" of {experts} experts" if experts > 1 else "")
        raise CheckpointError(
            f"{root} holds {len(files.dense)} tensors for the {wanted} of its config.json; each has its own; fetch "
            "or export it again."
        )


def _check_sizes(root: Path, files: ModelFiles, run: RunConfig) -> None:
    """Check what decides into how many parts tensors are cut, before they are."""
    width, head = run.model.hidden_size, run.model.hidden_size // run.model.num_attention_heads
    _check_counts(root, files, run.model.num_layers)
    if run.moe.enabled:
        _check_counts(root, files, len(run.moe_layers), run.moe.num_experts)
    embedding = files.dense.get(HF_EMBEDDING)
    held = () if embedding is None else embedding.entry.shape
    if len(held) != 2 or held[1] != width:
        wanted = str([run.model.padded_vocab(0), width])
        raise _unlike(root, HF_EMBEDDING, wanted, "absent" if embedding is None else str(list(held)))
    for layer in range(run.model.num_layers):
        name, shape = f"model.layers.{layer}.self_attn.k_proj.weight", (run.model.query_groups * head, width)
        keys = files.dense.get(name)
        if keys is None or keys.entry.shape != shape:
            raise _unlike(root, name, str(list(shape)), "absent" if keys is None else str(list(keys.entry.shape)))


def _check_shapes(root: Path, files: ModelFiles, wanted: dict[str, HfTensor], *, tied: bool) -> None:
    for name, tensor in wanted.items():
        held = files.dense.get(name)
        if held is None or held.entry.shape != tensor.shape:
            there = "absent" if held is None else str(list(held.entry.shape))
            raise _unlike(root, name, str(list(tensor.shape)), there)
    for name, place in files.dense.items():
        # Some writers save the embedding twice where it is tied.
        if name not in wanted and not name.endswith(_IGNORED) and not (tied and name == HF_OUTPUT):
            raise _unlike(root, name, "absent", str(list(place.entry.shape)))


def _unlike(root: Path, name: str, wanted: str, held: str) -> CheckpointError:
    return CheckpointError(
        f"{root} holds another model than its config.json describes: {name} is {held}, but {wanted} by its settings; a "
        "model is read whole or not at all; fetch or export it again."
    )
