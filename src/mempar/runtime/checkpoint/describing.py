"""The last files of a checkpoint, which make what was written one: megatron's description, the run, the manifest."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import mempar
from mempar.runtime.checkpoint import torch_dist
from mempar.runtime.checkpoint.manifest import CONFIG, MANIFEST, FileRecord, Manifest, write_manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import sync
from mempar.runtime.overrides import to_yaml


def describe(directory: Path, manifest: Manifest, run: RunConfig, common: bytes) -> Manifest:
    """Describe what has been written, the manifest last, and bring every name to the disk.

    Args:
        directory: with all files of tensors.
        manifest: of them.
        run: the run that the checkpoint is of.
        common: megatron's state dict without what is sharded, serialised.

    Returns:
        The manifest of all files.

    Raises:
        OSError: when they cannot be written.
    """
    files: Iterable[FileRecord] = manifest.files.values()
    added = torch_dist.write_description(
        directory, [record for record in files if record.path.endswith(torch_dist.SUFFIX)], common
    )
    added.append(torch_dist.write_small_file(directory, CONFIG, to_yaml(run).encode()))
    # Every random number is a function of the seed and of its place: name, slot and column, step.
    about = {**manifest.about, "random": {"seed": run.train.seed}, "versions": _versions()}
    whole = replace(manifest, about=about, files={**manifest.files, **{record.path: record for record in added}})
    torch_dist.write_small_file(directory, MANIFEST, write_manifest(whole))
    for path, _, _ in os.walk(directory):
        sync(Path(path))
    return whole


def _versions() -> dict[str, str]:
    versions = {"mempar": mempar.__version__, "python": platform.python_version()}
    for package in ("torch", "megatron-core", "numpy", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # Who converts needs no megatron.
            continue
    return versions
