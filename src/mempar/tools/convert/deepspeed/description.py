"""What a universal checkpoint does not say of itself, in a folder of our own in it: the model, the run, the checksums.

    mempar/description.json   tensors and their precision, how far the run was, checksums of every block of the files
    mempar/config.yaml        the resolved run

DeepSpeed reads neither. A universal checkpoint without them could be of any model: it is not read. Nothing here imports
torch.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.checkpoint.manifest import HISTORY, OPTIMIZER, WEIGHTS, TensorRecord, checksum
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import load_yaml, to_yaml
from mempar.tools.convert.deepspeed.places import OWN

DESCRIPTION, CONFIG = f"{OWN}/description.json", f"{OWN}/config.yaml"
FORMAT = 1
# A block takes some 20 bytes: room for millions.
_LARGEST_BYTES = 1 << 28
# Counters that every run has.
_COUNTERS = ("step", "applied_steps")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A file's numbers, cut at rows.

    Attributes:
        cuts: rows, 0 and the end among them.
        crcs: CRC-32 of what stands between two of them.
    """

    cuts: list[int]
    crcs: list[int]


@dataclass(frozen=True, kw_only=True)
class Description:
    """See the module.

    Attributes:
        run: the resolved run.
        tensors: of the checkpoint that was converted, digests among them.
        has_digests: whether the digests are theirs.
        progress: how far the run was.
        about: what else described it.
        blocks: of every file with a tensor, by path.
    """

    run: RunConfig
    tensors: Mapping[str, TensorRecord]
    has_digests: bool
    progress: dict[str, Any]
    about: dict[str, Any]
    blocks: dict[str, Blocks]


def encode(description: Description) -> dict[str, bytes]:
    """The content of our files, by path."""
    config = to_yaml(description.run).encode()
    body = {
        "config_checksum": checksum(config),
        "tensors": {
            name: [record.dtype, list(record.shape), record.kind, f"{record.digest:016x}"]
            for name, record in sorted(description.tensors.items())
        },
        "has_digests": description.has_digests,
        "progress": description.progress,
        "about": description.about,
        "blocks": {path: [blocks.cuts, blocks.crcs] for path, blocks in sorted(description.blocks.items())},
    }
    text = json.dumps({"format": FORMAT, "checksum": checksum(_text(body)), "description": body})
    return {CONFIG: config, DESCRIPTION: text.encode()}


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def read_description(root: Path) -> Description:
    """Read our files in a universal checkpoint.

    Raises:
        CheckpointError: when they are missing or damaged.
    """
    path = root / DESCRIPTION
    try:
        if (root / OWN).is_symlink() or not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _LARGEST_BYTES:
            raise _damaged(path, f"it is no plain file of at most {_LARGEST_BYTES} bytes")
        whole = json.loads(path.read_bytes())
        if whole["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {whole['format']!r}, this version of mempar reads {FORMAT}; use the mempar "
                "that wrote it."
            )
        body = whole["description"]
        if checksum(_text(body)) != whole["checksum"]:
            raise _damaged(path, "its checksum is not that of its text")
        return _decode(root, body)
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} holds no {DESCRIPTION}: a universal checkpoint alone does not say what model it is; only those "
            f"are read that `mempar convert` began; copy the folder {OWN} from the one that DeepSpeed's run began with."
        ) from None
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it describes no checkpoint ({type(error).__name__}: {error})") from None


def _decode(root: Path, body: dict[str, Any]) -> Description:
    tensors = {name: _record(entry) for name, entry in body["tensors"].items()}
    progress, about = dict(body["progress"]), dict(body["about"])
    if not all(type(progress[name]) is int and progress[name] >= 0 for name in _COUNTERS):
        raise ValueError("its counters are no numbers of steps")
    blocks = {path: _blocks(*entry) for path, entry in body["blocks"].items()}
    return Description(
        run=_read_config(root, body["config_checksum"]),
        tensors=tensors,
        has_digests=bool(body["has_digests"]),
        progress=progress,
        about=about,
        blocks=blocks,
    )


def _record(entry: list[Any]) -> TensorRecord:
    dtype, shape, kind, digest = entry
    if kind not in (WEIGHTS, OPTIMIZER, HISTORY) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a tensor is {entry}")
    return TensorRecord(dtype=str(dtype), shape=tuple(shape), kind=kind, digest=int(digest, 16))


def _blocks(cuts: list[int], crcs: list[int]) -> Blocks:
    rising = all(type(cut) is int for cut in cuts) and all(start < stop for start, stop in pairwise(cuts))
    if cuts[0] != 0 or not rising or len(crcs) != len(cuts) - 1:
        raise ValueError("blocks of a file do not follow one another")
    if not all(type(crc) is int and 0 <= crc < 1 << 32 for crc in crcs):
        raise ValueError("a checksum is none")
    return Blocks(cuts=cuts, crcs=crcs)


def _read_config(root: Path, wanted: str) -> RunConfig:
    path = root / CONFIG
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _LARGEST_BYTES:
            raise _damaged(path, f"it is no plain file of at most {_LARGEST_BYTES} bytes")
        found = checksum(path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from None
    if found != wanted:
        raise _damaged(path, "its checksum is not that of what was written")
    try:
        return load_yaml(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} is not of this version of mempar: {error}") from None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {why}; a universal checkpoint is used whole or not at all; restore the file, or convert "
        "again."
    )
