"""Weights alone, read from a checkpoint of any layout into a model of one process."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.boxes import Box, whole_box
from mempar.runtime.checkpoint.dense import weight_parts
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.checkpoint.reading import Reader
from mempar.runtime.checkpoint.shard_file import dtype_name
from mempar.runtime.model import Model

_EMBEDDING = "embedding.word_embeddings.weight"


def padded_vocab(manifest: Manifest) -> int:
    """Embeddings of a checkpoint, padding included.

    Raises:
        CheckpointError: when it has none.
    """
    record = manifest.tensors.get(_EMBEDDING)
    if record is None or len(record.shape) != 2:
        raise CheckpointError(
            f"{manifest.root} has no embeddings ({_EMBEDDING}); a checkpoint holds a whole model; use another one."
        )
    return record.shape[0]


def read_weights(manifest: Manifest, model: Model) -> None:
    """Fill a model's parameters, and its tables that lie in memory; checksums of all that is read are compared.

    What the checkpoint holds beside weights is not read. Numbers of another type are converted.

    Raises:
        CheckpointError: when a file is damaged, or lacks what the model needs.
    """
    reader = Reader(manifest)
    for box, target in [*weight_parts(model), *_table_parts(model)]:
        _read(reader, box, target)


def _table_parts(model: Model) -> Iterable[tuple[Box, Tensor]]:
    for table in model.tables:
        values = table.shard.values
        yield whole_box(table.name, dtype_name(values.dtype), tuple(values.shape)), values


def _read(reader: Reader, box: Box, target: Tensor) -> None:
    record = reader.manifest.tensors.get(box.name)
    if record is None or record.dtype == box.dtype:
        reader.read(box, target)
        return
    stored = torch.empty(box.sizes, dtype=getattr(torch, record.dtype))
    reader.read(replace(box, dtype=record.dtype), stored)
    target.copy_(stored)
