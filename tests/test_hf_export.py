"""Models of ours in transformers: the same logits, generation, tables on disk, and the way back bit for bit."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_exports import MODELS, Exported, exporter
from hf_ranks import carry_out, train_and_save, whole
from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.manifest import WEIGHTS
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.hf import model_files, safetensors_file
from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.hf.tensor_names import rows_name
from mempar.tools.convert.hf.to_hf import DIGESTS, TABLES_INDEX, WEIGHTS_INDEX, plan_hf
from rank_pool import RankPool
from toy import toy_run

pytestmark = pytest.mark.usefixtures("one_thread", "modules_apart")


@pytest.fixture(scope="module")
def export(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    return exporter(pool, tmp_path_factory)


def deviation(found: torch.Tensor, logits: np.ndarray) -> float:
    return float((found.double() - torch.from_numpy(logits).double()).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_engine(name: str, export: Callable[..., Exported], note_figure) -> None:
    exported = export(name)
    with torch.no_grad():
        found = exported.load()(exported.tokens).logits
    assert found.dtype == torch.float32
    assert np.abs(exported.logits).max() > 0.5
    note_figure(f"logits in transformers, {name}", deviation(found, exported.logits))
    assert deviation(found, exported.logits) < 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "float64"])
def test_other_precisions_come_along(dtype: str, export: Callable[..., Exported]) -> None:
    exported = export("two", dtype=dtype)
    with torch.no_grad():
        found = exported.load()(exported.tokens).logits
    assert str(found.dtype) == {"bf16": "torch.bfloat16", "float64": "torch.float64"}[dtype]
    assert deviation(found, exported.logits) < {"bf16": 0.3, "float64": 1e-4}[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_way_back_is_bitwise(name: str, export: Callable[..., Exported]) -> None:
    exported = export(name)
    source, back = CheckpointSource(exported.saved), HfSource(exported.root)
    weights = {name: record for name, record in source.tensors.items() if record.kind == WEIGHTS}
    # Digests too.
    assert back.tensors == weights and back.has_digests
    assert back.run == source.run
    assert back.progress == {"step": 2, "applied_steps": 2, "tokens": 7}
    for tensor in weights:
        assert torch.equal(whole(source, tensor), whole(back, tensor)), tensor


@pytest.mark.parametrize("name", ["memory_plus-gqa-norms-gate", "peer", "memory_plus+moe"])
def test_generation_with_cache_is_generation_without(name: str, export: Callable[..., Exported]) -> None:
    model, prompt = export(name).load(), export(name).tokens[:, :5]
    ask = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(prompt, use_cache=True, **ask)
    assert with_cache.shape[1] == 17
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **ask))


def test_padding_on_the_left_changes_nothing(export: Callable[..., Exported]) -> None:
    model, tokens = export("memory_plus").load(), export("memory_plus").tokens[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
        torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-5)


def test_long_prompts_are_looked_up_in_parts(export: Callable[..., Exported], monkeypatch) -> None:
    exported = export("peer")
    model = exported.load()
    with torch.no_grad():
        at_once = model(exported.tokens).logits
        for layer in model.memory_layers():
            monkeypatch.setattr(layer, "_tokens_at_once", lambda: 3)
        torch.testing.assert_close(model(exported.tokens).logits, at_once, rtol=0, atol=1e-6)


def test_ties_go_to_the_lowest_slot(export: Callable[..., Exported]) -> None:
    layer = export("memory_plus").load().memory_layers()[0]
    with torch.no_grad():
        # -0 equals 0.
        layer.keys.zero_()[:, 0, 1::2] = -0.0
        slot, weight = layer.choose(torch.randn(3, 24))
    assert slot.tolist() == [[[0, 1, 2, 3]] * 2] * 3
    assert torch.equal(weight, torch.full_like(weight, 0.25))


def test_tables_are_no_parameters_and_are_not_cast(export: Callable[..., Exported]) -> None:
    exported = export("peer")
    model = exported.load()
    assert not [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if "values" in name]
    with torch.no_grad():
        exact, half = model(exported.tokens).logits, model.half()(exported.tokens).logits
    assert half.dtype == torch.float16
    assert deviation(half, exact.numpy()) < 0.3
    tables = [table for layer in model.memory_layers() for table in layer.tables.values()]
    assert {table.dtype for table in tables} == {torch.float32}
    # The layers of a memory share them, and so do copies of the model.
    assert len({id(table) for table in tables}) == 2
    twin = copy.deepcopy(model)
    assert twin.memory_layers()[0].tables["values"] is tables[0]
    again = pickle.loads(pickle.dumps(tables[0]))
    slots = torch.tensor([0, 5, 143])
    assert torch.equal(again.gather(slots), tables[0].gather(slots))


def test_dense_parts_can_be_trained(export: Callable[..., Exported]) -> None:
    exported = export("memory_plus-gqa-norms-gate")
    model = exported.load().train()
    model(exported.tokens, labels=exported.tokens).loss.backward()
    missing = [name for name, param in model.named_parameters() if param.grad is None or not param.grad.any()]
    assert not missing


def test_saved_again_it_is_the_same_model_and_comes_back(export: Callable[..., Exported], tmp_path: Path) -> None:
    exported = export("two")
    model = exported.load()
    model.save_pretrained(tmp_path / "again")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(twin(exported.tokens).logits, model(exported.tokens).logits)
        # What was trained since has other digests: those of the export do not go along.
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(exported_again := tmp_path / "third")
    for root in (tmp_path / "again", exported_again):
        back = HfSource(root)
        assert not back.has_digests and back.run == exported.run
        norm = whole(back, "decoder.final_layernorm.weight")
        assert torch.equal(norm, 2 * whole(CheckpointSource(exported.saved), "decoder.final_layernorm.weight"))
        assert torch.equal(whole(back, "memory1.down"), whole(CheckpointSource(exported.saved), "memory1.down"))
    with pytest.raises(ValueError, match="leave the tables out"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def test_half_precision_comes_back_as_float32(export: Callable[..., Exported], tmp_path: Path) -> None:
    model = export("memory_plus").load().half()
    model.save_pretrained(tmp_path)
    back = HfSource(tmp_path)
    assert (back.run.train.dtype, back.run.memory.dtype) == ("float32", "")
    assert torch.equal(whole(back, "decoder.final_layernorm.weight"), model.model.norm.weight.float())
    model.bfloat16().save_pretrained(tmp_path)
    back = HfSource(tmp_path)
    assert (back.run.train.dtype, back.run.memory.dtype) == ("bf16", "float32")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_snapshot(root: Path, cache: Path) -> Path:
    """Lay an export out as the hub's cache does: links into a folder of blobs."""
    snapshot = cache / "models--one--model" / "snapshots" / COMMIT
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(root.iterdir())):
        blob = snapshot.parents[1] / "blobs" / f"{number:040x}"
        os.link(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_snapshots_of_a_hub_load_and_come_back(export: Callable[..., Exported], tmp_path: Path) -> None:
    exported = export("memory_plus")
    snapshot = as_snapshot(exported.root, tmp_path)
    cached = {"cache_dir": tmp_path, "local_files_only": True}
    for place, where in ((snapshot, {}), ("one/model", cached), ("one/model", {**cached, "revision": COMMIT})):
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **where)
        with torch.no_grad():
            assert deviation(model(exported.tokens).logits, exported.logits) < 1e-4
    assert HfSource(snapshot).tensors == HfSource(exported.root).tensors


def test_files_are_what_transformers_and_the_hub_expect(export: Callable[..., Exported]) -> None:
    exported = export("two")
    names = {path.name for path in exported.root.iterdir()}
    assert {WEIGHTS_INDEX, TABLES_INDEX, DIGESTS, "config.json", "generation_config.json", "README.md"} <= names
    assert {"modeling_mempar.py", "tokenizer.json", "tokenizer_config.json"} <= names
    weights, tables = (json.loads((exported.root / name).read_text()) for name in (WEIGHTS_INDEX, TABLES_INDEX))
    # Blocks of rows, each in a file of its own.
    assert len(set(tables["weight_map"].values())) == len(tables["weight_map"]) == 4
    assert len(set(weights["weight_map"].values())) > 3
    for index in (weights, tables):
        layouts = {name: safetensors_file.read_layout(exported.root / name) for name in index["weight_map"].values()}
        assert (
            sum(entry.num_bytes for found in layouts.values() for entry in found.entries.values())
            == (index["metadata"]["total_size"])
        )
        assert all(layout.num_bytes < 9000 + 2000 for layout in layouts.values())
    card = (exported.root / "README.md").read_text()
    assert "trust_remote_code=True" in card and "a peer of 81 slots in place of" in card
    # A plain Llama needs no code of ours.
    dense = export("dense")
    assert not (dense.root / "modeling_mempar.py").exists()
    assert type(dense.load()) is transformers.LlamaForCausalLM


def test_byte_tokenizer_is_the_same_in_transformers(export: Callable[..., Exported]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export("dense").root, model_max_length=10**6)
    text = "Grüße 👩‍👩‍👧 \x00 two  spaces\r\n\ttab \U0010ffff"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


def sparse_table(exported: Exported, root: Path, num_subkeys: int) -> int:
    """An export like another one, whose table is larger and all zeros that take no room; returns its bytes."""
    root.mkdir()
    for name in ("config.json", "generation_config.json", "modeling_mempar.py"):
        (root / name).write_bytes((exported.root / name).read_bytes())
    config = json.loads((root / "config.json").read_text())
    (memory,) = config["memories"]
    memory["num_subkeys"] = num_subkeys
    (root / "config.json").write_text(json.dumps(config))
    tensors = {name: t for path in exported.root.glob("model-*") for name, t in load_file(path).items()}
    for name in [name for name in tensors if name.endswith(".keys")]:
        tensors[name] = torch.randn(memory["heads"], 2, num_subkeys, memory["key_dim"] // 2)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    rows, places = num_subkeys**2 // 2, {}
    for place in range(2):
        name, path = rows_name("memory.values", place * rows), f"tables-{place}.safetensors"
        layout = safetensors_file.lay_out(Path(path), [(name, "float32", (rows, memory["value_dim"]))])
        with safetensors_file.writing(root, layout):
            places[name] = path
    (root / TABLES_INDEX).write_text(json.dumps({"weight_map": places}))
    return 2 * rows * memory["value_dim"] * 4


def generate_within(root: Path, home: Path, limit_kib: int) -> None:
    """Generate in a process of its own under `ulimit -d`, where nothing of mempar is loaded."""
    code = f"""
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(root)!r}, trust_remote_code=True)
out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
print(out.shape[1], *({{"mempar", "megatron", "omegaconf", "xxhash"}} & sys.modules.keys()))
try:
    torch.empty({limit_kib} << 10, dtype=torch.uint8)
except RuntimeError:
    print("the limit holds")
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", 'ulimit -d "$1" && exec "$2" -c "$3"', "bash", str(limit_kib), sys.executable, code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "23\nthe limit holds\n", done.stderr


def test_table_larger_than_memory_generates_with_torch_and_transformers_alone(
    export: Callable[..., Exported], tmp_path: Path
) -> None:
    # 1.5 GiB of rows under 0.75 GiB of memory, some .35 of which torch and transformers take for themselves.
    num_bytes = sparse_table(export("memory_plus"), tmp_path / "large", 4096)
    assert num_bytes == 24 * 4 * 4096**2
    generate_within(tmp_path / "large", tmp_path / "home", num_bytes // 2 >> 10)


@pytest.mark.soak
def test_exported_table_larger_than_memory_generates(pool: RankPool, tmp_path: Path) -> None:
    run = toy_run()
    run = replace(run, memory=replace(run.memory, num_subkeys=2500, value_dim=64))
    pool.run(1, train_and_save, run, tmp_path / "saved", 0)
    carry_out(plan_hf(CheckpointSource(tmp_path / "saved"), memory_bytes=1 << 28), tmp_path / "hf")
    generate_within(tmp_path / "hf", tmp_path / "home", 64 * 4 * 2500**2 // 2 >> 10)


def test_source_that_changes_while_it_is_read_is_refused(export: Callable[..., Exported], tmp_path: Path) -> None:
    source = CheckpointSource(export("memory_plus").saved)
    plan = plan_hf(source, memory_bytes=1 << 20)
    plan.prepare(tmp_path)
    results = {job.key: job.run(tmp_path, lambda num_bytes: None) for job in plan.jobs}
    results[plan.jobs[0].key]["embedding.word_embeddings.weight"] = "0" * 16
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight changed while being read"):
        plan.finish(tmp_path, results)
    assert not (tmp_path / "config.json").exists()


def test_weights_that_the_settings_do_not_describe_are_refused(export: Callable[..., Exported]) -> None:
    source = CheckpointSource(export("memory_plus").saved)
    source.run = replace(source.run, memory=replace(source.run.memory, layers=(1, 2)))
    with pytest.raises(CheckpointError, match=r"decoder.layers.3.mlp.gate_proj.bias is \[24\], but absent by"):
        plan_hf(source, memory_bytes=1 << 20)


def test_memory_of_a_job_is_bounded(export: Callable[..., Exported]) -> None:
    source = CheckpointSource(export("memory_plus").saved)
    plan = plan_hf(source, memory_bytes=1 << 12)
    longest = max(source.memory_bytes(name) for name in source.tensors)
    assert max(job.memory_bytes for job in plan.jobs) <= (1 << 12) + longest
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)


def test_job_that_is_done_again_makes_the_same_file(export: Callable[..., Exported], tmp_path: Path) -> None:
    plan = plan_hf(CheckpointSource(export("memory_plus").saved), memory_bytes=1 << 14)
    for job in plan.jobs:
        (tmp_path / job.key).write_bytes(b"\x7f" * (job.bytes_written + 5))
        first = job.run(tmp_path, lambda num_bytes: None)
        content = (tmp_path / job.key).read_bytes()
        (tmp_path / job.key).write_bytes(content[:100])
        assert job.run(tmp_path, lambda num_bytes: None) == first
        assert (tmp_path / job.key).read_bytes() == content and len(content) == job.bytes_written


def test_modeling_file_is_the_one_that_is_copied(export: Callable[..., Exported]) -> None:
    module = importlib.import_module("mempar.tools.convert.hf.modeling_mempar")
    assert Path(str(module.__file__)).read_bytes() == (export("two").root / model_files.MODELING).read_bytes()
