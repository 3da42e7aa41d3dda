"""Saving and loading what a toy session holds."""

from pathlib import Path
from typing import Any

from mempar.runtime.checkpoint.loading import load_checkpoint
from mempar.runtime.checkpoint.manifest import HISTORY_SINCE, read_manifest
from mempar.runtime.checkpoint.saving import Save
from mempar.runtime.config import RunConfig
from toy import Session


def save_checkpoint(path: Path, run: RunConfig, session: Session, progress: dict[str, Any]) -> None:
    """Save what a session holds; every rank calls it."""
    meta = {"progress": progress, HISTORY_SINCE: dict.fromkeys(session.optimizers.histories, 0)}
    Save(path, run, session.world, session.model, session.optimizers, meta).finish()


def load_into(session: Session, path: Path) -> None:
    """Load a checkpoint into a session; every rank calls it."""
    load_checkpoint(read_manifest(path), session.world, session.model, session.optimizers)
