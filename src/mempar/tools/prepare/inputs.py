"""The files to prepare: directories searched, formats told by names, and what says that a file has not changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError

FORMATS = ("text", "jsonl", "parquet")
COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One file.

    Attributes:
        path: absolute.
        form: text, jsonl or parquet.
        compression: gz, bz2, xz, zst, or nothing.
        num_bytes: on disk.
        changed_ns: time of the last change.
    """

    path: Path
    form: str
    compression: str
    num_bytes: int
    changed_ns: int

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for the file to be the same."""
        return {"path": str(self.path), "bytes": self.num_bytes, "changed_ns": self.changed_ns, "format": self.form}


def find_inputs(paths: list[str], prefix: Path, form: str | None = None) -> list[Input]:
    """List the files in the order in which they are read.

    Args:
        paths: files, and directories, of which all files are taken by the order of their paths, hidden ones left out.
        prefix: of the result, absolute; it must lie outside of the directories.
        form: format of all files; None tells it by their names: text unless called .jsonl, .json, .ndjson, .parquet
            or .pq.

    Raises:
        ConfigError: for what is missing, a format that is not known, and a result among the inputs.
    """
    if form is not None and form not in FORMATS:
        raise ConfigError(f"--format {form} is not known; the formats are: {', '.join(FORMATS)}; use one of these.")
    found: list[Input] = []
    for name in paths:
        path = Path(name).expanduser().resolve()
        if path.is_dir() and prefix.is_relative_to(path):
            raise ConfigError(
                f"--out {prefix} lies in the INPUT directory {path}, all of whose files are read; results would be "
                "inputs of the next call; write them elsewhere, or name the files."
            )
        if path.is_dir():
            found += [_input(one, form) for one in sorted(path.rglob("*")) if one.is_file() and not _hidden(one, path)]
        elif path.is_file():
            found.append(_input(path, form))
        else:
            raise ConfigError(f"{name} does not exist; an INPUT is a file or a directory of files; correct the path.")
    if not found:
        raise ConfigError(f"no files in {', '.join(paths)}; there must be something to prepare; name files with text.")
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _input(path: Path, form: str | None) -> Input:
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    form = form or _FORMAT_OF_SUFFIX.get(inner.suffix.lower(), "text")
    if form == "parquet" and compression:
        raise ConfigError(
            f"{path} is Parquet inside {path.suffix}; Parquet compresses its columns itself and is read from its end; "
            "decompress the file first."
        )
    status = path.stat()
    return Input(path=path, form=form, compression=compression, num_bytes=status.st_size, changed_ns=status.st_mtime_ns)
