"""Models opened from checkpoints: the logits of training, from any layout, with tables in memory or in their files."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hf_exports import MODELS
from hf_ranks import train_and_save
from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.forward import Forward
from mempar.runtime.inference.opened import open_model, table_bytes
from mempar.runtime.mcore import AttnMaskType, causal_past_the_prompt
from rank_pool import RankFailure, RankPool
from toy import VOCAB, Session, batches_of, toy_run
from toy_checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
# Tokens that are given to a cache at a time: the prompt, one by one, and the rest at once.
STEPS = (5, 1, 1, 1, 3)
# `two` is a memory_plus and a PEER memory.
NAMES = ["dense-tied-gqa", "memory_plus-gqa-norms-gate", "two", "moe", "beside"]


def read(path: Path, tokens: np.ndarray, tables: Any, dtype: str = "") -> dict[str, Any]:
    """On a rank: what an opened model says of tokens, at once and with a cache."""
    given = torch.from_numpy(tokens)
    with open_model(path, tables=tables, dtype=dtype) as opened:
        forward = opened.forward
        cache = forward.new_cache(len(given), given.shape[1])
        parts, last = [], []
        for part in given.split([*STEPS, given.shape[1] - sum(STEPS)], 1):
            parts.append(forward.logits(part, cache, padded=True))
        cache.cut(7)
        last.append(forward.logits(given[:, 7:11], cache, last_only=True))
        last.append(forward.logits(given[:, :11], last_only=True))
        return {
            "logits": forward.logits(given, padded=True).numpy(),
            "cached": torch.cat(parts, 1).numpy(),
            "last": [each.numpy() for each in last],
            "tables": (opened.tables, [table.name for table in opened.model.tables]),
            "numbers": {str(table.shard.values.dtype) for table in opened.model.tables},
            "table_bytes": table_bytes(opened.manifest, opened.run),
            "sizes": (opened.vocab_size, opened.max_length, opened.run.parallel.smallest_world),
            "gradients": any(param.requires_grad for param in opened.model.chunks[0].parameters()),
        }


def mapped_tolerance(run: RunConfig) -> float:
    """Sums of rows are the same bit for bit; how torch adds up a product depends on how the row lies in memory."""
    return 1e-6 if any(memory.variant == "peer" for memory in run.memories.values()) else 0.0


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_training_with_and_without_cache(
    name: str, pool: RankPool, tmp_path: Path, note_figure
) -> None:
    run = toy_run(**MODELS[name])
    ((tokens, logits),) = pool.run(1, train_and_save, run, tmp_path / "saved")
    loaded, in_files = (pool.run(1, read, tmp_path / "saved", tokens, tables)[0] for tables in ("memory", "mapped"))
    assert loaded["tables"][0] == "memory" and in_files["tables"] == ("mapped", [])
    assert len(loaded["tables"][1]) == sum(len(memory.table_names) for memory in run.memories.values())
    np.testing.assert_array_equal(loaded["logits"], logits)
    for key in ("logits", "cached"):
        np.testing.assert_allclose(in_files[key], loaded[key], rtol=0, atol=mapped_tolerance(run))
    assert loaded["sizes"] == (VOCAB, run.train.seq_length, 1) and not loaded["gradients"]
    deviation = float(np.abs(loaded["cached"] - logits).max())
    note_figure("logits with a cache, float32", deviation)
    assert deviation < 1e-5 < np.abs(logits).max()
    for last in loaded["last"]:
        assert last.shape == (len(tokens), 1, VOCAB)
        np.testing.assert_allclose(last[:, 0], logits[:, 10, :VOCAB], rtol=0, atol=1e-5)
    if name in ("two", "moe"):
        (wide,) = pool.run(1, read, tmp_path / "saved", tokens, "memory", "float64")
        assert wide["logits"].dtype == np.float64
        np.testing.assert_allclose(wide["cached"], wide["logits"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(wide["logits"], logits, rtol=0, atol=1e-4)


def test_float64_is_exact_in_scores_too(pool: RankPool, tmp_path: Path) -> None:
    run = toy_run(memory={"score_dtype": "bf16"})
    ((tokens, logits),) = pool.run(1, train_and_save, run, tmp_path / "saved")
    (narrow,) = pool.run(1, read, tmp_path / "saved", tokens, "memory", "")
    np.testing.assert_array_equal(narrow["logits"], logits)
    (wide,) = pool.run(1, read, tmp_path / "saved", tokens, "memory", "float64")
    assert wide["logits"].dtype == np.float64
    np.testing.assert_allclose(wide["cached"], wide["logits"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
def test_tables_stay_in_their_type_whatever_is_computed_in(kind: str, pool: RankPool, tmp_path: Path) -> None:
    run = toy_run(kind=kind, dtype="float64")
    ((tokens, logits),) = pool.run(1, train_and_save, run, tmp_path / "saved")
    for dtype, tolerance in (("", 0.0), ("float32", 1e-4)):
        loaded, mapped = (
            pool.run(1, read, tmp_path / "saved", tokens, tables, dtype)[0] for tables in ("memory", "mapped")
        )
        assert loaded["numbers"] == {"torch.float64"}
        tables = [read_manifest(tmp_path / "saved").tensors[name] for name in loaded["tables"][1]]
        assert loaded["table_bytes"] == mapped["table_bytes"] == sum(8 * prod(table.shape) for table in tables)
        np.testing.assert_allclose(mapped["logits"], loaded["logits"], rtol=0, atol=mapped_tolerance(run))
        np.testing.assert_allclose(loaded["logits"], logits, rtol=0, atol=tolerance)


def save_and_read(run: RunConfig, target: Path) -> np.ndarray | None:
    """On a rank of any layout: save initial values; returns logits of the model in training where it has them all."""
    session = Session(run)
    save_checkpoint(target, run, session, {"step": 0, "applied_steps": 0})
    logits = None
    if run.parallel.pp == 1:
        session.model.hook_slots(None)
        forward = Forward(session.model, run, session.world, VOCAB)
        given = batches_of(run, 0)[0].tokens
        cache = forward.new_cache(len(given), given.shape[1])
        parts = [forward.logits(part, cache, padded=True) for part in given.split((6, given.shape[1] - 6), 1)]
        logits = torch.cat(parts, 1).numpy()
    tear_down(session.world)
    return logits


@pytest.mark.parametrize(
    ("world", "settings", "sizes"),
    [
        (2, {"kind": "two", "ragged": True}, {"mp": 2, "mp_rows": 2}),
        (2, {"kind": "two", "ragged": True}, {"mp": 2, "mp_rows": 1}),
        (4, {"kind": "peer"}, {"tp": 2, "mp": 4, "mp_rows": 2, "distributed_optimizer": True}),
        (2, {"kind": "memory_plus", "dtype": "bf16"}, {"pp": 2, "distributed_optimizer": True}),
        (2, {"kind": "memory_plus+moe", "tied": True}, {"ep": 2, "mp": 2}),
    ],
    ids=["rows", "columns", "tensor parallel, grid", "pipeline, bf16", "experts, tied"],
)
def test_checkpoints_of_any_layout_are_opened(
    world: int, settings: dict[str, Any], sizes: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    # Initial values do not depend on the layout.
    plain = toy_run(**settings)
    ((tokens, logits),) = pool.run(1, train_and_save, plain, tmp_path / "plain", 0)
    in_training = pool.run(world, save_and_read, toy_run(**settings, **sizes), tmp_path / "cut")
    for tables in ("memory", "mapped"):
        (found,) = pool.run(1, read, tmp_path / "cut", tokens, tables)
        tolerance = mapped_tolerance(plain) if tables == "mapped" else 0.0
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=tolerance)
    for mine in in_training:
        if mine is not None:
            np.testing.assert_allclose(mine, logits, rtol=0, atol=1e-5)


def refused(run: RunConfig) -> str:
    """On a rank: why its model in training has no logits."""
    session = Session(run)
    with pytest.raises(ConfigError) as raised:
        Forward(session.model, run, session.world, VOCAB)
    tear_down(session.world)
    return str(raised.value)


def test_pipelines_in_training_are_refused(pool: RankPool) -> None:
    assert all("pp=2" in said and "save a checkpoint" in said for said in pool.run(2, refused, toy_run(pp=2)))


def describe_world(path: Path) -> tuple[bool, int, int]:
    """On two ranks: each opens a model of its own; the world that was there stays."""
    with open_model(path) as opened:
        logits = opened.forward.logits(torch.full((1 + opened.world.rank, 3), 5))
        return dist.is_initialized(), opened.world.placement.grid.dp, len(logits)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "checkpoints" / "step_00000002"
    root.parent.mkdir()
    pool.run(1, train_and_save, toy_run(kind="peer"), root)
    return root


def test_several_processes_have_a_model_each(saved: Path, pool: RankPool) -> None:
    assert pool.run(2, describe_world, saved) == [(True, 2, 1), (True, 2, 2)]


def test_tables_that_are_large_are_mapped(saved: Path, pool: RankPool) -> None:
    for available, expected in ((1 << 40, "memory"), (4 * 12**2 * 24 * 4 - 1, "mapped")):
        assert pool.run(1, where_tables_are, saved, available) == [expected]


def where_tables_are(path: Path, available: int) -> str:
    """On a rank with so much memory to spare."""
    from mempar.runtime.inference import opened as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "available_bytes", lambda: available)
        with open_model(path) as opened:
            return opened.tables


def copied(root: Path, target: Path) -> Path:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(root)).write_bytes(path.read_bytes())
    return target


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damage_is_found(saved: Path, pool: RankPool, tmp_path: Path) -> None:
    tokens = np.zeros((1, 16), np.int64)
    root = copied(saved, tmp_path / "table")
    (table,) = (root / "tables" / "memory.values").iterdir()
    flip(table, -5)
    with pytest.raises(RankFailure, match=r"memory\.values, rows .* is not that of what was written"):
        pool.run(1, read, root, tokens, "memory")
    # What is mapped is not read through: that is what `mempar verify` is for.
    pool.run(1, read, root, tokens, "mapped")
    table.write_bytes(table.read_bytes()[:-5])
    with pytest.raises(RankFailure, match=r"bytes where .* were written"):
        pool.run(1, read, root, tokens, "mapped")
    root = copied(saved, tmp_path / "dense")
    ((dense, piece),) = read_manifest(root).pieces_of("decoder.final_layernorm.weight")
    flip(root / dense, piece.start + piece.num_bytes - 1)
    with pytest.raises(CheckpointError, match="is not that of what was written"):
        open_here(root)


def open_here(root: Path) -> None:
    """In this process, which joins a world of its own and leaves it."""
    threads = torch.get_num_threads()
    try:
        with open_model(root, tables="mapped"):
            pass
    finally:
        torch.set_num_threads(threads)
        assert not dist.is_initialized()


def test_other_words_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype=fp8 is not known; it is one of"), open_model(saved, dtype="fp8"):
        pass


def test_paths_that_are_no_checkpoints_are_explained(saved: Path, tmp_path: Path) -> None:
    run = saved.parents[1]
    assert find_checkpoint(saved) == find_checkpoint(run) == saved
    for make, why in (
        (lambda root: None, "nothing of this name"),
        (lambda root: root.mkdir(), "neither manifest.json nor checkpoints"),
        (lambda root: (root / "config.yaml").write_text("name: a\n"), "has saved no checkpoint yet"),
        (lambda root: (root / "config.yaml").rename(root / "config.json"), "`mempar convert` makes a checkpoint"),
    ):
        make(tmp_path / "there")
        with pytest.raises(ConfigError, match=why):
            find_checkpoint(tmp_path / "there")
    for name, why in (("x" * 300, "no file has so long a name"), ("a\0b", "nothing of this name")):
        with pytest.raises(ConfigError, match=why):
            find_checkpoint(tmp_path / name)


def test_attention_of_transformer_engine_stays_causal_past_the_prompt() -> None:
    class Attention:
        def forward(self, query: list, key: list, value: list, mask: None, attn_mask_type: Any, **kwargs: Any) -> Any:
            return attn_mask_type, kwargs

    attention = causal_past_the_prompt(Attention)()
    kinds = AttnMaskType
    for queries, given, expected in (
        (4, kinds.causal, kinds.causal),
        (1, kinds.no_mask, kinds.no_mask),
        (3, kinds.no_mask, kinds.causal_bottom_right),
    ):
        found = attention.forward([0] * queries, [], [], None, attn_mask_type=given, attention_bias=None)
        assert found == (expected, {"attention_bias": None})
