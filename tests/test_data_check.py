"""Data that are not what the run takes them for are refused; data are known by their content, not by their place."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mempar.errors import ConfigError
from mempar.runtime.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from mempar.runtime.data import check as data_check
from mempar.runtime.data.check import data_identity, identity_differences
from mempar.runtime.data.manifest import checksum, manifest_path, read_index, read_manifest
from mempar.runtime.data.one_prefix import check_prefix, run_on_prefix
from mempar.runtime.data.samples import Samples
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.mcore import IndexedDatasetBuilder
from mempar.runtime.preflight import check_data
from mempar.tools.prepare.command import prepare
from toy_tokenizers import all_specs, byte_level, ranks


def prepared(folder: Path, tokenizer: str, name: str = "data", text: str = "some text of a few words") -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    prepare([str(folder / f"{name}.txt")], tokenizer=tokenizer, out=folder / name, workers=1, say=lambda _: None)
    return str(folder / name)


def foreign(prefix: Path, tokens: list[int], dtype: type = np.uint16) -> str:
    """A pair that Megatron's own builder has made."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_item(torch.tensor(tokens, dtype=torch.int32))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def run_on(*paths: str, tokenizer: str = "byte", **model: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**model), train=TrainConfig(seq_length=4), data=DataConfig(paths=paths, tokenizer=tokenizer)
    )


def test_prepared_data_of_every_tokenizer_are_accepted(tmp_path: Path) -> None:
    for number, spec in enumerate(all_specs(tmp_path)):
        run = run_on(prepared(tmp_path / str(number), spec), tokenizer=spec)
        check_data(run)
        manifest = read_manifest(run.data.paths[0])
        assert manifest is not None and vocab_size(run) == manifest.vocab_size
        assert Samples(run, run.data.paths, (), seed=1)[0].max() < manifest.vocab_size


def test_training_needs_no_tokenizer_library_nor_torch_to_check(tmp_path: Path) -> None:
    specs = all_specs(tmp_path)
    paths = [prepared(tmp_path / str(number), spec) for number, spec in enumerate(specs)]
    for path in tmp_path.glob("toy.*"):
        path.unlink()
    program = (
        "import sys\n"
        "for name in ('tokenizers', 'sentencepiece', 'tiktoken', 'torch', 'pyarrow'): sys.modules[name] = None\n"
        "from mempar.runtime.config import *\n"
        "from mempar.runtime.data.check import data_identity\n"
        "from mempar.runtime.preflight import check_data\n"
        f"for path, spec in zip({paths}, {specs}):\n"
        "    run = RunConfig(data=DataConfig(paths=(path,), tokenizer=spec), train=TrainConfig(seq_length=2))\n"
        "    check_data(run), data_identity(run)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_size_of_a_vocabulary_comes_from_data_then_model_then_tokenizer(tmp_path: Path) -> None:
    spec = f"hf:{byte_level(tmp_path / 'hf', end=None)}"
    assert vocab_size(run_on(tokenizer=spec)) == 301
    assert vocab_size(run_on(tokenizer="hf:nowhere/at-all", vocab_size=1000)) == 1000
    path = prepared(tmp_path / "data", spec)
    assert vocab_size(run_on(path, tokenizer=spec, vocab_size=1000)) == 301
    with pytest.raises(ConfigError, match=r"model\.vocab_size=300 is smaller than the 301 tokens"):
        vocab_size(run_on(path, tokenizer=spec, vocab_size=300))


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    specs = all_specs(tmp_path)
    path = prepared(tmp_path / "data", specs[1])
    for spec in (specs[0], specs[2], specs[3], "tiktoken:gpt2", f"hf:{byte_level(tmp_path / 'other', end=None)}"):
        with pytest.raises(ConfigError, match=r"was prepared with hf:.*set data\.tokenizer=hf:"):
            check_data(run_on(path, tokenizer=spec))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="was prepared with"):
        check_data(run_on(path, tokenizer=specs[1]))


def test_tokenizers_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    path = prepared(tmp_path / "data", f"hf:{byte_level(tmp_path / 'hf')}")
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    check_data(run_on(path, tokenizer=f"hf:{tmp_path / 'moved'}"))
    check_data(run_on(path, tokenizer=f"hf:{tmp_path / 'moved' / 'tokenizer.json'}"))
    # Its file is not here: the name decides.
    check_data(run_on(path, tokenizer=f"hf:{tmp_path / 'hf'}"))
    with pytest.raises(ConfigError, match="was prepared with"):
        check_data(run_on(path, tokenizer="hf:elsewhere"))
    path = prepared(tmp_path / "ranks", f"tiktoken:{ranks(tmp_path / 'o200k_base.tiktoken')}")
    check_data(run_on(path, tokenizer="tiktoken:o200k_base"))
    with pytest.raises(ConfigError, match="was prepared with"):
        check_data(run_on(path, tokenizer="tiktoken:o200k"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_prepared_files_of_another_size_are_refused(tmp_path: Path, suffix: str) -> None:
    path = prepared(tmp_path, "byte")
    Path(f"{path}.{suffix}").write_bytes(Path(f"{path}.{suffix}").read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"data\.{suffix} has \d+ bytes, and .*data\.json says"):
        check_data(run_on(path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 1, "bin": 3}'])
def test_unreadable_manifests_are_refused(tmp_path: Path, content: str) -> None:
    path = prepared(tmp_path, "byte")
    manifest_path(path).write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be read as a manifest|has format 2"):
        check_data(run_on(path))


def test_foreign_data_are_checked_by_their_index_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path / "x", [*range(257)] * 3)
    check_data(run_on(path))
    for dtype in (np.uint16, np.int32):
        beyond = foreign(tmp_path / f"beyond {dtype.__name__}", [5, 6, 256, 257, 7], dtype)
        with pytest.raises(
            ConfigError, match=r"holds the token 257, and the vocabulary has 257; ids are from 0 to 256"
        ):
            check_data(run_on(beyond))
        check_data(run_on(beyond, vocab_size=258))
    with pytest.raises(ConfigError, match="holds the token -1"):
        check_data(run_on(foreign(tmp_path / "negative", [1, -1, 2, 3, 4], np.int32)))
    # Beyond a size, blocks are looked at, the last one always; what lies between is met when it is read.
    monkeypatch.setattr(data_check, "_BLOCK_BYTES", 8)
    monkeypatch.setattr(data_check, "SCANNED_BYTES", 16)
    with pytest.raises(ConfigError, match="holds the token 999"):
        check_data(run_on(foreign(tmp_path / "last", [1] * 50 + [999])))
    hidden = run_on(foreign(tmp_path / "hidden", [1] * 20 + [999] + [1] * 20))
    check_data(hidden)
    samples = Samples(hidden, hidden.data.paths, (), seed=1)
    with pytest.raises(ConfigError, match=r"hidden holds the token 999"):
        for index in range(10):
            samples[index]


def test_foreign_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "x", [1, 2, 3, 4, 5])
    whole = Path(f"{path}.idx").read_bytes()
    for content in (b"", whole[:-1], whole[:20], b"x" + whole[1:]):
        Path(f"{path}.idx").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.idx is no index of Megatron's, or is cut short"):
            check_data(run_on(path))
    Path(f"{path}.idx").write_bytes(whole)
    Path(f"{path}.bin").write_bytes(b"x" * 9)
    with pytest.raises(ConfigError, match=r"x\.bin has 9 bytes, but .*x\.idx lists 5 tokens of uint16"):
        check_data(run_on(path))


def test_trigram_baseline_of_a_large_vocabulary_is_refused(tmp_path: Path) -> None:
    spec = f"hf:{byte_level(tmp_path / 'hf', end=None)}"
    path = prepared(tmp_path / "data", spec)
    run = run_on(path, tokenizer=spec)
    run = replace(run, data=replace(run.data, heldout_paths=(path,), trigram_baseline=True))
    check_data(run)
    with pytest.raises(ConfigError, match=r"data\.trigram_baseline=true with the 301 tokens"):
        check_data(replace(run, train=replace(run.train, heldout_samples=1)))


def test_one_data_set_is_held_against_the_embeddings_of_a_model(tmp_path: Path) -> None:
    run = run_on()
    for files in ((), (".bin",)):
        for suffix in files:
            (tmp_path / f"some{suffix}").write_bytes(b"")
        with pytest.raises(ConfigError, match=rf"--data {tmp_path}/some: .*{'idx' if files else 'bin'} is not there"):
            check_prefix(f"{tmp_path}/some", "--data")
    ours, other = prepared(tmp_path / "a", "byte"), foreign(tmp_path / "foreign", [1, 2, 299])
    check_prefix(ours, "--data")
    # Whatever the run read itself.
    alone = run_on_prefix(replace(run, data=replace(run.data, heldout_paths=("nowhere",))), ours, 257)
    assert (alone.data.paths, alone.data.heldout_paths) == ((ours,), ())
    with pytest.raises(ConfigError, match="prepared with byte, of 257 tokens, and the model has 256 embeddings"):
        run_on_prefix(run, ours, 256)
    # More embeddings than tokens of the tokenizer.
    run_on_prefix(run, other, 300)
    with pytest.raises(ConfigError, match="holds the token 299, and the vocabulary has 299"):
        run_on_prefix(run, other, 299)


def test_identity_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def make(folder: Path, text: str) -> tuple[str, str]:
        ours = prepared(folder, "byte", text=text)
        return ours, foreign(folder / "foreign", [*text.encode(), 256])

    paths = make(tmp_path / "a", "the same length")
    before = data_identity(run_on(*paths))
    manifest, index = read_manifest(paths[0]), read_index(paths[1])
    assert manifest is not None
    assert before["data.paths[0]"] == {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "bin_bytes": manifest.bin.num_bytes,
        "bin_xxh3_128": checksum(Path(f"{paths[0]}.bin")).xxh3_128,
        "tokenizer": "byte",
        "idx_bytes": manifest.idx.num_bytes,
        "idx_xxh3_128": checksum(Path(f"{paths[0]}.idx")).xxh3_128,
    }
    assert before["data.paths[1]"]["tokens"] == index.tokens
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = tuple(path.replace("/a/", "/b/") for path in paths)
    assert identity_differences(before, data_identity(run_on(*moved))) == []
    other = data_identity(run_on(*make(tmp_path / "c", "another of them")))
    # Of foreign data of the same lengths only the sizes are known.
    (difference,) = identity_differences(before, other)
    assert "data.paths[0] has bin_xxh3_128" in difference
    manifest_path(moved[0]).unlink()
    assert identity_differences(before, data_identity(run_on(*moved))) == []
    assert identity_differences(before, data_identity(run_on(moved[0]))) == ["data.paths are 2 there and 1 here"]
    # Of each path the first: sizes tell more than checksums.
    phrases = identity_differences(before, data_identity(run_on(*make(tmp_path / "d", "shorter"))))
    assert len(phrases) == len(paths) and all("tokens" in phrase for phrase in phrases), phrases
