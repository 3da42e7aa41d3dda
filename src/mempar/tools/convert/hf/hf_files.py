"""The files of a directory of transformers': its config, its indices, and where each tensor lies."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.errors import CheckpointError
from mempar.tools.convert.hf.safetensors_file import SUFFIX, Entry, FileLayout, open_plain, read_layout
from mempar.tools.convert.hf.to_hf import DIGESTS, TABLES_INDEX, TAG, WEIGHTS_INDEX

_CONFIG, _GENERATION, _SINGLE = "config.json", "generation_config.json", "model.safetensors"
# Far more than any index or config has.
_LARGEST_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: its name in a file."""

    name: str
    layout: FileLayout

    @property
    def entry(self) -> Entry:
        """What the file says of it."""
        return self.layout.entries[self.name]


class ModelFiles:
    """What a directory holds.

    Attributes:
        config: the content of config.json.
        generation: the content of generation_config.json; empty where there is none.
        dense: where the tensors of the model lie, by name.
        tables: where the blocks of its tables lie, by name.
        digests: of our tensors, by name; None unless the files are those that were exported with them.
        identity: tells this directory from another one, and from itself when a file of it has changed.
    """

    def __init__(self, root: Path) -> None:
        """Read the headers of all files.

        Raises:
            CheckpointError: when something is missing, damaged, or would lie outside the directory.
        """
        self.root = root
        self.config = self._json(_CONFIG)
        self.generation = self._json(_GENERATION) if (root / _GENERATION).exists() else {}
        self._layouts: dict[str, FileLayout] = {}
        self.dense = self._dense()
        self.tables = self._indexed(TABLES_INDEX) if (root / TABLES_INDEX).exists() else {}
        self.digests = self._digests()
        states = [self._state(name) for name in sorted(self._layouts)]
        self.identity = json.dumps([self.config, self.generation, states], sort_keys=True)

    def _dense(self) -> dict[str, Place]:
        # Where there are both, transformers loads the single file.
        if (self.root / _SINGLE).exists():
            layout = self._layout(_SINGLE)
            return {name: Place(name=name, layout=layout) for name in layout.entries}
        if (self.root / WEIGHTS_INDEX).exists():
            return self._indexed(WEIGHTS_INDEX)
        others = sorted(path.name for path in self.root.glob("*.bin")) + sorted(p.name for p in self.root.glob("*.pt*"))
        found = f"only {others[0]}, a pickle, which would run what it says" if others else "none"
        raise CheckpointError(
            f"{self.root} has no {_SINGLE} or {WEIGHTS_INDEX} ({found}); weights are read from safetensors; save the "
            "model with transformers' save_pretrained, which writes them."
        )

    def _indexed(self, index: str) -> dict[str, Place]:
        places = self._json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise _damaged(self.root / index, "its weight_map does not name a file for each tensor")
        found = {}
        for name, file_name in places.items():
            layout = self._layout(file_name)
            if name not in layout.entries:
                raise _damaged(self.root / index, f"it says that {file_name} holds {name!r}, which is not so")
            found[name] = Place(name=name, layout=layout)
        return found

    def _layout(self, file_name: str) -> FileLayout:
        if file_name not in self._layouts:
            if not file_name.endswith(SUFFIX):
                raise _damaged(self.root, f"it names the file {file_name!r} for weights, which are in {SUFFIX} files")
            self._layouts[file_name] = read_layout(self._inside(file_name))
        return self._layouts[file_name]

    def _inside(self, file_name: str) -> Path:
        """The path of a file beside config.json; a link may lead to the directory itself, or to a hub cache's blobs."""
        path = self.root / file_name
        if Path(file_name).name != file_name or not file_name.isprintable():
            raise _damaged(self.root, f"it names the file {file_name!r}, which is no name of a file in it")
        root, real = self.root.resolve(), path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(directory) for directory in allowed):
            raise _damaged(path, f"it is a link to {real}, outside the directory")
        return path

    def _json(self, file_name: str) -> dict[str, Any]:
        path = self._inside(file_name)
        try:
            with open_plain(path) as file:
                if os.fstat(file.fileno()).st_size > _LARGEST_BYTES:
                    raise _damaged(path, f"it has more than {_LARGEST_BYTES} bytes")
                content = json.loads(file.read())
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}); a model of transformers' is a directory with a config.json "
                "and safetensors files; name such a directory."
            ) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"it is no JSON ({error})") from None
        if not isinstance(content, dict):
            raise _damaged(path, "it is no JSON object")
        return content

    def _digests(self) -> dict[str, int] | None:
        """Whoever saves the model again with transformers leaves the digests behind, or files without their tag."""
        if not (self.root / DIGESTS).exists():
            return None
        described = self._json(DIGESTS)
        tags = {layout.metadata.get(TAG) for layout in self._layouts.values()}
        if tags != {described.get("tag")}:
            return None
        try:
            return {name: int(digits, 16) for name, digits in described["digests"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged(self.root / DIGESTS, "it holds no digests") from None

    def _state(self, file_name: str) -> list[Any]:
        status = os.stat(self.root / file_name)
        return [file_name, self._layouts[file_name].header.hex(), status.st_size, status.st_mtime_ns]


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}; a model is used whole or not at all; fetch or export it again.")
