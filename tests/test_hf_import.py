"""Llamas of transformers' as models of ours, and what is refused of a directory that comes from anywhere."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ranks import carry_out, hf_source, hf_source_with_memory, logits_of, whole
from mempar.errors import CheckpointError, ConfigError, MemparError
from mempar.runtime.checkpoint.boxes import Box
from mempar.tools.convert.hf import hf_files, llama_config
from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.hf.tensor_names import rows_name
from mempar.tools.convert.hf.to_hf import TABLES_INDEX, WEIGHTS_INDEX, plan_hf
from mempar.tools.convert.with_memory import WithMemory
from rank_pool import RankPool

pytestmark = pytest.mark.usefixtures("one_thread", "modules_apart")


def make_llama(root: Path, **settings: Any) -> Path:
    """Save a small Llama with random weights, norms among them."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    dtype, shards = settings.pop("dtype", torch.float32), settings.pop("max_shard_size", "5GB")
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(root, max_shard_size=shards)
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


def hf_logits(root: Path, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True, **settings).eval()(tokens).logits


LLAMAS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied-sharded": {"tie_word_embeddings": True, "max_shard_size": "20KB"},
    "mha-base": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "odd-vocabulary": {"vocab_size": 77, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", LLAMAS)
def test_engine_computes_what_the_llama_does(name: str, pool: RankPool, tmp_path: Path, note_figure) -> None:
    root = make_llama(tmp_path / "llama", **LLAMAS[name])
    ((tokens, logits),) = pool.run(1, logits_of, hf_source, root)
    found = hf_logits(root, torch.from_numpy(tokens))
    assert found.shape == logits.shape and found.abs().max() > 0.5
    deviation = float((found - torch.from_numpy(logits)).abs().max())
    note_figure(f"logits of a Llama, {name}", deviation)
    assert deviation < 1e-4


def test_llama_of_transformers_4_is_read_too(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": 20000, "rope_scaling": None, "torch_dtype": "float32"}
    assert parameters["rope_theta"] == 10000.0
    for path in llama.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(os.path.relpath(path, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="outside the directory"):
        HfSource(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    assert HfSource(tmp_path).run.model.rotary_base == 20000


def test_settings_of_a_llama_become_those_of_a_run(llama: Path) -> None:
    run = HfSource(llama).run
    assert (run.model.num_layers, run.model.hidden_size, run.model.query_groups) == (3, 32, 2)
    assert (run.model.vocab_size, run.model.vocab_multiple, run.model.padded_vocab(0)) == (96, 32, 96)
    assert (run.train.dtype, run.data.tokenizer, run.memories) == ("float32", f"hf:{llama}", {})
    assert HfSource(llama).progress == {"step": 0, "applied_steps": 0} and not HfSource(llama).has_digests


def test_llama_tokenizer_is_named_where_there_is_one(llama: Path, tmp_path: Path) -> None:
    settings = json.loads((llama / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(b"")
    run = llama_config.llama_run(settings, tmp_path, "float32")
    assert run.data.tokenizer == f"sentencepiece:{tmp_path / 'tokenizer.model'}"
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert llama_config.llama_run(settings, tmp_path, "float32").data.tokenizer == f"hf:{tmp_path}"


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, "float32"), (torch.bfloat16, "bf16")])
def test_narrow_numbers_come_exactly(dtype: torch.dtype, expected: str, tmp_path: Path) -> None:
    root = make_llama(tmp_path / "llama", dtype=dtype)
    source = HfSource(root)
    assert source.run.train.dtype == expected
    weights = load_file(root / "model.safetensors")
    norm = whole(source, "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight")
    assert torch.equal(norm, weights["model.layers.1.input_layernorm.weight"].to(norm.dtype))


def test_wider_norms_widen_all(llama: Path, tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(llama / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    source = HfSource(tmp_path)
    assert source.run.train.dtype == "float32"
    assert torch.equal(whole(source, "embedding.word_embeddings.weight"), weights["model.embed_tokens.weight"].float())


def test_any_box_is_read(llama: Path, fresh_seed: int) -> None:
    source = HfSource(llama)
    draw = torch.Generator().manual_seed(fresh_seed)
    for name, record in source.tensors.items():
        full = whole(source, name)
        for _ in range(3):
            ends = [sorted(torch.randint(0, size + 1, (2,), generator=draw).tolist()) for size in record.shape]
            offset, sizes = tuple(a for a, _ in ends), tuple(b - a for a, b in ends)
            box = Box(name=name, dtype=record.dtype, shape=record.shape, offset=offset, sizes=sizes)
            # A part of something wider, too.
            target = torch.full((*sizes[:-1], sizes[-1] + 1), torch.nan)[..., :-1]
            source.read(box, target)
            assert torch.equal(target, full[tuple(slice(a, b) for a, b in ends)]), (name, ends)


def test_round_trip_through_mempar_is_the_llama_again(llama: Path, tmp_path: Path) -> None:
    carry_out(plan_hf(HfSource(llama), memory_bytes=1 << 16, max_shard_bytes=30000), tmp_path / "hf")
    found = {name: t for path in (tmp_path / "hf").glob("model-*") for name, t in load_file(path).items()}
    before = load_file(llama / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    tokens = torch.arange(20)[None]
    assert torch.equal(hf_logits(tmp_path / "hf", tokens), hf_logits(llama, tokens))


MEMORY = ["memory.num_subkeys=12", "memory.heads=2", "memory.top_k=4", "memory.key_dim=16", "memory.layers=[0,2]"]
BESIDE = [*MEMORY, "memory.beside=true"]


@pytest.mark.parametrize(
    "more",
    [[], ["memory.value_dim=20", "memory.scalar_gate=true"], ["memory.variant=memory"], ["memory.variant=peer"]],
    ids=["memory_plus", "memory_plus-gate", "memory", "peer"],
)
def test_memory_beside_leaves_the_first_logits_as_they_were(
    more: list[str], llama: Path, pool: RankPool, tmp_path: Path
) -> None:
    ((tokens, logits),) = pool.run(1, logits_of, hf_source_with_memory, llama, [*BESIDE, *more])
    expected = hf_logits(llama, torch.from_numpy(tokens))
    assert float((expected - torch.from_numpy(logits)).abs().max()) < 1e-4
    # In transformers not one bit differs.
    carry_out(plan_hf(WithMemory(HfSource(llama), [*BESIDE, *more]), memory_bytes=1 << 16), tmp_path / "hf")
    assert torch.equal(hf_logits(tmp_path / "hf", torch.from_numpy(tokens)), expected)


def test_memory_in_place_is_the_same_model_here_and_there(llama: Path, pool: RankPool, tmp_path: Path) -> None:
    ((tokens, logits),) = pool.run(1, logits_of, hf_source_with_memory, llama, MEMORY)
    carry_out(plan_hf(WithMemory(HfSource(llama), MEMORY), memory_bytes=1 << 16), tmp_path / "hf")
    found = hf_logits(tmp_path / "hf", torch.from_numpy(tokens))
    assert float((found - torch.from_numpy(logits)).abs().max()) < 1e-4
    assert not torch.allclose(found, hf_logits(llama, torch.from_numpy(tokens)), atol=0.1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another-model": ({"model_type": "mistral"}, "model_type='mistral'"),
    "scaled-angles": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        "rope_scaling='llama3'",
    ),
    "scaled-angles-4": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "part-of-a-head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "broken-base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta=10000.5"),
    "biases": ({"attention_bias": True}, "attention_bias=True"),
    "mlp-biases": ({"mlp_bias": True}, "mlp_bias=True"),
    "wide-heads": ({"head_dim": 16}, "head_dim=16"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "no-size": ({"hidden_size": "wide"}, "hidden_size='wide'"),
    "no-epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
    "other-size": ({"intermediate_size": 48}, "model.layers.0.mlp.gate_proj.weight is [40, 32], but [48, 32]"),
    "more-blocks": ({"num_hidden_layers": 4}, "model.layers.3.self_attn.k_proj.weight is absent, but [16, 32]"),
    "fewer-blocks": ({"num_hidden_layers": 2}, "model.layers.2"),
    "odd-groups": ({"num_key_value_heads": 3}, "num_query_groups=3"),
    "no-run": ({"mempar": {"progress": {}, "run": {"model": {"layers": 3}}}}, "'model.layers' is not a setting"),
    "no-progress": ({"mempar": {"progress": {"step": -1}}}, "does not say how far the run was"),
}


def changed(llama: Path, root: Path, config: dict[str, Any]) -> Path:
    """The same Llama with other settings."""
    root.mkdir(exist_ok=True)
    given = {**json.loads((llama / "config.json").read_text()), **config}
    (root / "config.json").write_text(json.dumps(given))
    os.link(llama / "model.safetensors", root / "model.safetensors")
    return root


def refusal(root: Path, kind: type[MemparError] = ConfigError) -> str:
    with pytest.raises(kind) as raised:
        HfSource(root)
    text = str(raised.value)
    assert "\n" not in text and text.count(";") >= 2
    return text


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_mempar_does_not_compute_are_refused(name: str, llama: Path, tmp_path: Path) -> None:
    settings, expected = REFUSED[name]
    assert expected in refusal(changed(llama, tmp_path / "other", settings))


def damaged_model(write: Callable[[bytes, dict[str, Any]], bytes]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        path.unlink()
        path.write_bytes(write(raw, json.loads(raw[8 : 8 + length])))

    return damage


def with_header(raw: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]


def with_norm(**entry: Any) -> Callable[[Path], None]:
    def change(raw: bytes, header: dict[str, Any]) -> bytes:
        header["model.norm.weight"] |= entry
        return with_header(raw, header)

    return damaged_model(change)


def indexed(index: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        # Beside a single file nobody reads an index.
        (root / "model.safetensors").rename(root / "model-1.safetensors")
        (root / WEIGHTS_INDEX).write_text(json.dumps(index))

    return damage


def as_pickle(root: Path) -> None:
    (root / "model.safetensors").rename(root / "pytorch_model.bin")


def missing(root: Path) -> None:
    (root / "config.json").unlink()


NORMS = ["model.norm.weight", *(f"model.layers.{layer}.input_layernorm.weight" for layer in range(3))]
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut-short": (damaged_model(lambda raw, _: raw[:-4]), "does not lie at"),
    "empty": (damaged_model(lambda raw, _: b""), "its header has 0 bytes and the file 0"),
    "long-header": (damaged_model(lambda raw, _: (1 << 60).to_bytes(8, "little") + raw[8:]), "its header has 115"),
    "no-json": (damaged_model(lambda raw, _: raw[:8] + b"[" + raw[9:]), "its header is none"),
    "negative-shape": (with_norm(shape=[-32]), "are not sizes"),
    "huge-shape": (with_norm(shape=[1 << 60]), "does not lie at"),
    "half-a-row": (with_norm(shape=[31.5]), "are not sizes"),
    "whole-numbers": (with_norm(dtype="I32"), "model.norm.weight in I32"),
    "pickle": (as_pickle, "only pytorch_model.bin, a pickle"),
    "no-config": (missing, "config.json cannot be read (No such file or directory)"),
    "no-object": (lambda root: (root / "config.json").write_text("[1]"), "it is no JSON object"),
    "deep": (lambda root: (root / "config.json").write_text("[" * 100000), "it is no JSON"),
    "path": (indexed({"weight_map": {"model.norm.weight": "../llama/model.safetensors"}}), "no name of a file in it"),
    "other-file": (indexed({"weight_map": {"model.norm.weight": "config.json"}}), "which are in .safetensors files"),
    "wrong-map": (indexed({"weight_map": {"lm_head": "model-1.safetensors"}}), "holds 'lm_head', which is not so"),
    "no-map": (indexed({"weight_map": 3}), "does not name a file for each tensor"),
    "absent": (indexed({"weight_map": dict.fromkeys(NORMS, "model-1.safetensors")}), "is absent, but [96, 32]"),
    "control-characters": (indexed({"weight_map": {"a": "\x1b.safetensors"}}), "'\\x1b.safetensors'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_directories_are_refused(name: str, llama: Path, tmp_path: Path) -> None:
    root = changed(llama, tmp_path / "llama", {})
    damage, expected = DAMAGED[name]
    damage(root)
    assert expected in refusal(root, CheckpointError)


def test_file_that_is_cut_short_while_it_is_read_is_refused(llama: Path, tmp_path: Path) -> None:
    root = changed(llama, tmp_path / "llama", {})
    damaged_model(lambda raw, _: raw)(root)
    source = HfSource(root)
    with (root / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 4)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read .*: it ends at byte"):
        for name in source.tensors:
            whole(source, name)


def test_identity_is_that_of_the_content(llama: Path, tmp_path: Path) -> None:
    root = changed(llama, tmp_path / "llama", {})
    before = HfSource(root).identity
    assert before == HfSource(root).identity
    damaged_model(lambda raw, _: raw[:-1] + bytes([raw[-1] ^ 1]))(root)
    assert HfSource(root).identity != before
    assert hf_files.ModelFiles(root).tables == {}


def broken_tables(root: Path, change: Callable[[dict[str, str]], None]) -> str:
    index = json.loads((root / TABLES_INDEX).read_text())
    change(index["weight_map"])
    (root / TABLES_INDEX).write_text(json.dumps(index))
    return re.sub(re.escape(str(root)), "ROOT", refusal(root, CheckpointError))


def test_tables_with_holes_are_refused(llama: Path, tmp_path: Path) -> None:
    plan = plan_hf(WithMemory(HfSource(llama), MEMORY), memory_bytes=1 << 16, max_shard_bytes=5000)
    first, second = rows_name("memory.values", 0), rows_name("memory.values", 39)
    for number, (change, expected) in enumerate(
        [
            (lambda places: places.pop(first), "is 39, but rows from 0 on of [144, 32]"),
            (lambda places: places.pop(second), "but rows from 39 on of"),
            (lambda places: places.clear(), "memory.values is 0 rows, but 144 rows"),
        ]
    ):
        carry_out(plan, tmp_path / str(number))
        assert expected in broken_tables(tmp_path / str(number), change)


def test_settings_that_were_changed_after_an_export_are_refused(llama: Path, tmp_path: Path) -> None:
    carry_out(plan_hf(WithMemory(HfSource(llama), MEMORY), memory_bytes=1 << 16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memories"][0]["top_k"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "has memories=" in refusal(tmp_path, CheckpointError)
