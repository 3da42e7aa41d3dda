"""Directories of transformers' that would hang, or take all memory, or say something else to transformers."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ranks import carry_out, whole
from mempar.errors import CheckpointError
from mempar.tools.convert.hf import hf_files, llama_config, safetensors_file
from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.hf.tensor_names import parse_rows_name, rows_name
from mempar.tools.convert.hf.to_hf import TABLES_INDEX, WEIGHTS_INDEX, plan_hf
from mempar.tools.convert.hf.tokenizer_files import tokenizer_files
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
