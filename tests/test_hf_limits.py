"""Directories of transformers' that would hang, or take all memory, or say something else to transformers."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ranks import carry_out, whole
from mempar.errors import CheckpointError
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.formats import plan_to
from mempar.tools.convert.hf import hf_files, llama_config, safetensors_file
from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.hf.kept_settings import KEY, KeptSettings, kept_settings
from mempar.tools.convert.hf.model_files import generation_config
from mempar.tools.convert.hf.tensor_names import parse_rows_name, rows_name
from mempar.tools.convert.hf.to_hf import TABLES_INDEX, WEIGHTS_INDEX, plan_hf
from mempar.tools.convert.hf.tokenizer_files import tokenizer_files
from mempar.tools.convert.selection import Weights
from mempar.tools.convert.with_memory import WithMemory

pytestmark = pytest.mark.usefixtures("one_thread", "modules_apart")
MEMORY = ["memory.num_subkeys=12", "memory.heads=2", "memory.top_k=4", "memory.key_dim=16", "memory.layers=[0]"]


def make_llama(root: Path, shards: str = "5GB", **settings: Any) -> Path:
    """Save a small Llama."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).save_pretrained(root, max_shard_size=shards)
    return root


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(root: Path) -> str:
    began = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        HfSource(root)
    assert time.monotonic() - began < 5
    text = str(raised.value)
    assert "\n" not in text and text.count(";") >= 2
    return text


def test_tokenizer_that_is_not_there_is_not_ours(tmp_path: Path) -> None:
    root = make_llama(tmp_path, vocab_size=300)
    name = HfSource(root).run.data.tokenizer
    assert name == f"hf:{root}"
    found = tokenizer_files(name, 64)
    assert (found.files, found.eod) == ({}, None) and found.note


def test_single_file_is_read_before_shards_as_transformers_does(tmp_path: Path) -> None:
    root = make_llama(tmp_path / "llama", shards="20KB")
    make_llama(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(root / "model.safetensors")
    assert (root / WEIGHTS_INDEX).exists()
    loaded = AutoModelForCausalLM.from_pretrained(root).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(whole(HfSource(root), "embedding.word_embeddings.weight"), loaded)


def test_own_refusals_are_not_wrapped(tmp_path: Path) -> None:
    root = make_llama(tmp_path)
    rewrite(root / "config.json", lambda config: config.update(num_key_value_heads="two"))
    text = refusal(root)
    assert "num_key_value_heads='two'" in text and "describes no model" not in text


def test_numbers_that_are_no_sizes_are_refused(tmp_path: Path) -> None:
    settings = {"num_attention_heads": 1, "hidden_size": 10**400, "head_dim": 4}
    with pytest.raises(CheckpointError, match="hidden_size=1000"):
        llama_config.llama_run(settings, tmp_path, "float32")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", WEIGHTS_INDEX, "generation_config.json"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path) -> None:
    root = make_llama(tmp_path, shards="20KB" if name == WEIGHTS_INDEX else "5GB")
    (root / name).unlink()
    os.mkfifo(root / name)
    assert "it is no plain file" in refusal(root)


def test_what_describes_a_model_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_llama(tmp_path)
    monkeypatch.setattr(safetensors_file, "_LARGEST_HEADER_BYTES", 100)
    assert "its header has" in refusal(root)
    monkeypatch.setattr(hf_files, "_LARGEST_BYTES", 100)
    assert "more than 100 bytes" in refusal(root)


def test_names_of_blocks_have_twelve_digits() -> None:
    assert parse_rows_name(rows_name("memory.values", 39)) == ("memory.values", 39)
    for digits in ("39", "1" * 5000, "²" * 12, "-00000000039"):
        assert parse_rows_name(f"memory.values.rows-{digits}") is None


@pytest.mark.parametrize(
    "settings",
    [{"num_hidden_layers": 10**8}, {"hidden_size": 10**9, "num_attention_heads": 10**9, "num_key_value_heads": 10**9}],
    ids=["layers", "heads"],
)
def test_counts_that_no_file_holds_are_refused_at_once(settings: dict[str, int], tmp_path: Path) -> None:
    root = make_llama(tmp_path)
    rewrite(root / "config.json", lambda config: config.update(settings, head_dim=None))
    assert ("100000000 layers" if "num_hidden_layers" in settings else "1000000000]") in refusal(root)


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        ("model", {"num_layers": 10**8}, "100000000 layers"),
        ("model", {"num_layers": "100000000"}, "'100000000' layers"),
        ("moe", {"num_experts": 10**8, "ffn_hidden_size": 8}, "2 layers of 100000000 experts"),
    ],
    ids=["layers", "text", "experts"],
)
def test_exports_with_such_counts_are_refused_too(
    section: str, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    carry_out(plan_hf(HfSource(make_llama(tmp_path / "llama")), memory_bytes=1 << 16), tmp_path / "hf")

    def change(config: dict[str, Any]) -> None:
        config["mempar"]["run"][section].update(settings)
        if section == "moe":
            config["memories"] = []
            config["experts"] = {"layers": [0, 1], "num_experts": 10**8, "top_k": 2, "intermediate_size": 8}

    rewrite(tmp_path / "hf" / "config.json", change)
    text = refusal(tmp_path / "hf")
    assert expected in text, text


def described(root: Path) -> dict[str, Any]:
    config, generation = (json.loads((root / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {
        f"{place} {name}": part.get(name)
        for place, part in zip("cg", (config, generation), strict=True)
        for name in tokens
    }
    return {**found, "length": config["max_position_embeddings"]}


def test_special_tokens_and_length_come_back(tmp_path: Path) -> None:
    settings = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "max_position_embeddings": 131072}
    root = make_llama(tmp_path / "llama", **settings)
    rewrite(root / "generation_config.json", lambda content: content.update(eos_token_id=[6, 7, 9]))
    before = described(root)
    assert (before["g eos_token_id"], before["length"]) == ([6, 7, 9], 131072)
    source = HfSource(root)
    for name, chosen in (("plain", source), ("memory", WithMemory(source, MEMORY)), ("weights", Weights(source))):
        own = tmp_path / name / "own"
        own.mkdir(parents=True)
        plan, _ = plan_to("mempar", chosen, [], 1 << 24)
        plan.prepare(own)
        plan.finish(own, {job.key: job.run(own, lambda num_bytes: None) for job in plan.jobs})
        carry_out(plan_hf(CheckpointSource(own), memory_bytes=1 << 16), tmp_path / name / "hf")
        assert described(tmp_path / name / "hf") == before
        assert HfSource(tmp_path / name / "hf").about == source.about


def test_what_is_no_token_of_the_model_is_not_kept() -> None:
    config = {"bos_token_id": 96, "eos_token_id": [1, "x"], "pad_token_id": -1, "max_position_embeddings": 0}
    for kept in (config, [], {"config": 3, "generation": config}, {"config": config, "generation": None}):
        assert kept_settings({KEY: kept}, 96, tokens=True) == KeptSettings()
    about = {KEY: {"config": {"bos_token_id": 3, "max_position_embeddings": 9}, "generation": {"eos_token_id": 4}}}
    # Of another tokenizer they would be other words.
    assert kept_settings(about, 96, tokens=False) == KeptSettings(config={"max_position_embeddings": 9})


def test_tokens_that_do_not_exist_are_never_drawn() -> None:
    def suppressed(*args: Any) -> Any:
        return json.loads(generation_config(*args)).get("suppress_tokens")

    assert suppressed(3, 4, 8, KeptSettings()) == [4, 5, 6, 7]
    assert suppressed(3, 4, 8, KeptSettings(config={"eos_token_id": [3, 5]})) == [4, 6, 7]
    assert suppressed(3, 8, 8, KeptSettings()) is suppressed(None, None, 8, KeptSettings()) is None
    assert suppressed(3, 4, 2000, KeptSettings()) is None


def test_saving_over_tables_leaves_those_who_mapped_them_alone(tmp_path: Path) -> None:
    roots = tmp_path / "first", tmp_path / "second"
    for number, root in enumerate(roots):
        source = WithMemory(HfSource(make_llama(tmp_path / str(number))), MEMORY)
        carry_out(plan_hf(source, memory_bytes=1 << 16), root)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True) for root in roots]
    first, second = models
    (table,) = [path.name for path in roots[1].glob("tables-*")]
    elsewhere = tmp_path / "elsewhere"
    (roots[1] / table).rename(elsewhere)
    (roots[1] / table).symlink_to(elsewhere)
    before, index = elsewhere.read_bytes(), (roots[1] / TABLES_INDEX).stat().st_ino
    first.save_pretrained(roots[1], is_main_process=False)
    assert (roots[1] / table).is_symlink()
    first.save_pretrained(roots[1])
    assert elsewhere.read_bytes() == before and not (roots[1] / table).is_symlink()
    assert (roots[1] / TABLES_INDEX).stat().st_ino != index and not list(roots[1].glob("*.partial"))
    with torch.no_grad():
        assert second(torch.arange(4)[None]).logits.isfinite().all()
        # A layer may be asked about no tokens.
        assert second.memory_layers()[0](torch.zeros(0, 32)).shape == (0, 32)
