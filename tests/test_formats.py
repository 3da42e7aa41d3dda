"""`mempar convert` between formats, as the command: what comes back is what went out, and the engine trains on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ranks import session_logits
from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.config import RunConfig
from mempar.tools.convert.formats import open_source
from mempar.tools.verify import differences
from rank_pool import RankPool
from test_convert_layouts import converted
from test_digest_law import MODELS, small_blocks, train_and_save
from test_hf_import import hf_logits, llama
from toy import Session, toy_run
from toy_checkpoints import load_into

__all__ = ["llama"]

pytestmark = pytest.mark.usefixtures("one_thread", "modules_apart")


def to(form: str, source: Path, destination: Path, layout: str = "", **options: Any) -> None:
    """Convert to a format whose directories have no manifest."""
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        converted(source, destination, layout, form=form, **options)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats") / "saved"
    pool.run(2, train_and_save, small_blocks(toy_run(**MODELS["two-row_adagrad-bf16"], mp=2, mp_rows=2)), root)
    return root


def test_state_survives_deepspeed_and_weights_survive_hugging_face(saved: Path, tmp_path: Path) -> None:
    to("deepspeed", saved, tmp_path / "ds")
    found = converted(tmp_path / "ds", tmp_path / "from-ds", "pp=2 mp=3 mp_rows=3")
    assert differences(read_manifest(saved), found) == []
    to("hf", saved, tmp_path / "hf")
    found = converted(tmp_path / "hf", tmp_path / "from-hf", "tp=2 mp=2 mp_rows=1")
    alone = converted(saved, tmp_path / "alone", "", weights_only=True)
    assert found.weights_only and differences(alone, found) == []
    assert replace(read_config(found), parallel=read_config(alone).parallel) == read_config(alone)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("tp=2", {"form": "hf"}, "tp=2 with --to hf: its files are the same for every layout"),
        ("mp=2", {"form": "deepspeed"}, "mp=2 with --to deepspeed"),
        ("memory.layers=[1]", {}, "holds the state of optimizers.*add --weights-only"),
        ("memory.layers=[1]", {"weights_only": True}, "memory"),
        ("memory.lairs=[1]", {"weights_only": True}, "memory"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: str, options: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(saved, tmp_path / "there", arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_directories_that_nobody_wrote_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing that can be converted"):
        open_source(tmp_path)


def loaded_logits(run: RunConfig, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a batch and their logits, from a checkpoint on a single rank."""
    session = Session(run)
    load_into(session, source)
    return session_logits(session)


def losses_from(run: RunConfig, source: Path) -> list[float]:
    """The losses of the first steps from a checkpoint."""
    session = Session(run)
    session.optimizers.watching = False
    load_into(session, source)
    losses = [session.step(step).loss for step in range(3)]
    tear_down(session.world)
    return losses


def test_a_llama_with_a_memory_beside_trains_in_any_layout(llama: Path, pool: RankPool, tmp_path: Path) -> None:
    memory = (
        "memory.layers=[1] memory.beside=true memory.num_subkeys=12 memory.heads=2 memory.top_k=3 memory.key_dim=16"
    )
    converted(llama, tmp_path / "one", f"{memory} memory.column_tile=4")
    converted(tmp_path / "one", tmp_path / "two", "tp=2 mp=2 mp_rows=2")
    run = read_config(read_manifest(tmp_path / "one"))
    train = replace(run.train, seq_length=16, micro_batch_size=1, global_batch_size=2)
    run = replace(run, train=train)
    ((tokens, logits),) = pool.run(1, loaded_logits, run, tmp_path / "one")
    expected = hf_logits(llama, torch.from_numpy(tokens), dtype=torch.float32).numpy()
    assert np.abs(logits - expected).max() <= 1e-4
    (alone,) = pool.run(1, losses_from, run, tmp_path / "one")
    for losses in pool.run(2, losses_from, run.with_parallel(tp=2, mp=2, mp_rows=2), tmp_path / "two"):
        assert losses == pytest.approx(alone, rel=1e-5)
