"""`mempar generate` as its users meet it: texts as they come, JSON, measurements, bad input."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from byte_models import byte_run, save_byte_model
from mempar.errors import ConfigError, MemparError
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.data.encoders import ByteEncoder, load_encoder
from mempar.runtime.data.tokenizer import TokenizerSpec, parse_spec
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.opened import open_model
from mempar.runtime.inference.tokens import encoder_of
from mempar.tools.generate import bench, command
from mempar.tools.generate.options import generate
from mempar.tools.generate.text_stream import TextStream
from rank_pool import RankPool
from toy_tokenizers import AWKWARD, all_specs

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 40
# Status, what it prints, what it notes or complains of.
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    pool.run(2, save_byte_model, byte_run(LENGTH, mp=2), root / "checkpoints" / "step_00000000")
    return root


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    app = typer.Typer()
    app.command()(generate)

    def run(*arguments: Any) -> tuple[int, str, str]:
        status, complaint = 0, ""
        try:
            app([str(each) for each in arguments], standalone_mode=False)
        except MemparError as error:
            status, complaint = error.exit_status, str(error)
        said = capsys.readouterr()
        return status, said.out, said.err + complaint

    return run


def test_texts_are_continued_from_the_newest_checkpoint_of_a_run(saved: Path, main: Main, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("drei\nvier ü")
    ask = (saved, "--prompt", "one two", "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 5)
    status, out, err = main(*ask)
    assert status == 0
    assert out.startswith("one two") and "\ndrei\nvier ü" in out
    assert "[--max-tokens were generated: 5 tokens after 7, " in err and "5 tokens after 12" in err
    status, out_json, err = main(*ask, "--json", "--tables", "mapped")
    assert (status, err) == (0, "")
    found = json.loads(out_json)
    assert (found["step"], found["tables"]) == (0, "mapped")
    # In memory and from files the same text.
    assert "".join(f"{each['prompt']}{each['text']}\n" for each in found["results"]) == out
    assert [each["ended_by"] for each in found["results"]] == ["max_tokens"] * 2
    assert [len(each["tokens"]) for each in found["results"]] == [5, 5]


def test_text_is_written_as_it_comes(saved: Path) -> None:
    written: list[str] = []
    notes: list[str] = []
    request = command.Request(checkpoint=saved, prompts=("abc",), max_tokens=8, temperature=3.0, tables="mapped")
    command.generate(request, write=written.append, note=notes.append)
    # The prompt, a piece for every token, what was held back, the end of the line.
    assert len(written) == 1 + 8 + 1 + 1 and written[0] == "abc" and written[-1] == "\n"
    assert "stay in their files" in notes[0] and "mempar verify" in notes[0]


def test_texts_end_with_the_document_and_with_the_context(
    saved: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "x" * (LENGTH - 6)
    drawing = ("--temperature", 2.0, "--top-p", 0.9, "--seed", 5)
    _, out, err = main(saved, "--prompt", prompt, *drawing)
    assert f"[the model's context is full: 6 tokens after {LENGTH - 6}, " in err
    _, out, _ = main(saved, "--prompt", prompt, *drawing, "--json")
    (full,) = json.loads(out)["results"]
    assert full["ended_by"] == "context"

    def with_another_end(*given: Any) -> ByteEncoder:
        encoder = ByteEncoder(TokenizerSpec("byte"))
        encoder.eod = full["tokens"][3]
        return encoder

    monkeypatch.setattr(command, "encoder_of", with_another_end)
    end = full["tokens"].index(full["tokens"][3]) + 1
    assert f"[the document ended: {end} tokens after " in main(saved, "--prompt", prompt, *drawing)[2]


def test_tokens_are_those_of_the_tokenizer(saved: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_fewer_tokens(*given: Any) -> ByteEncoder:
        encoder = ByteEncoder(TokenizerSpec("byte"))
        encoder.vocab_size = 5
        return encoder

    monkeypatch.setattr(command, "encoder_of", of_fewer_tokens)
    _, out, _ = main(saved, "--prompt", "a", "--temperature", 9.0, "--max-tokens", 20, "--json")
    assert set(json.loads(out)["results"][0]["tokens"]) <= set(range(5))


def test_tokenizers_are_those_of_the_data_where_that_is_known(saved: Path) -> None:
    manifest = read_manifest(find_checkpoint(saved))
    run = read_config(manifest)
    described: list[dict[str, Any]] = [{}, {"data.paths[0]": {"tokens": 3}}, {"data.paths[0]": {"tokenizer": "byte"}}]
    for data in [*described, {"data.paths[0]": ["no", "description"]}]:
        assert encoder_of(replace(manifest, about={"data": data}), run).fingerprint == "byte"
    other = {"data": {"data.paths[0]": {"tokenizer": "hf:0123:7"}}}
    with pytest.raises(ConfigError, match=r"tokenizer byte is byte, and the data of .* were prepared with hf:0123:7"):
        encoder_of(replace(manifest, about=other), run)


def test_seeds_draw_other_texts(saved: Path, main: Main) -> None:
    ask = (saved, "--max-tokens", 12, "--temperature", 1.0, "--json")
    (first, again), (other,) = (
        [each["tokens"] for each in json.loads(main(*ask, *more)[1])["results"]]
        for more in (("--prompt", "a", "--prompt", "a"), ("--prompt", "a", "--seed", 2))
    )
    assert first == again != other


def test_terminals_are_not_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    command._shower(written.append)("a\x1b[2J\tb\r\n\x9bü")
    assert written == ["a\ufffd[2J\tb\ufffd\n\ufffdü"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompt is given"),
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt", "\udcff"], "a prompt is not UTF-8"),
        (["--prompt", "x" * LENGTH], f"has {LENGTH} tokens; the model was trained on {LENGTH} at a time"),
        (["--prompt", "a", "--top-p", 1.5], "top-p=1.5"),
        (["--prompt", "a", "--temperature", -1], "temperature=-1"),
        (["--prompt", "a", "--max-tokens", 0], "--max-tokens 0"),
        (["--prompt", "a", "--tables", "disk"], "--tables disk is not known; it is one of auto, memory, mapped"),
        (["--prompt-file", "nothing.txt"], "--prompt-file nothing.txt cannot be read (No such file"),
        (["--prompt-file", "x" * 300], "cannot be read (File name too long)"),
        (["--bench", "--prompt", "a", "--seed", 3], "--prompt, --seed with --bench"),
    ],
)
def test_bad_input_is_one_message(arguments: list[Any], said: str, saved: Path, main: Main) -> None:
    status, out, err = main(saved, *arguments)
    assert (status, out) == (2, "") and said in err and "\n" not in err


def test_bad_checkpoints_are_one_message(saved: Path, main: Main, tmp_path: Path, pool: RankPool) -> None:
    status, _, err = main(tmp_path, "--prompt", "a")
    assert status == 2 and "is no checkpoint: it holds neither manifest.json nor checkpoints" in err
    (tmp_path / "text").write_bytes(b"\xff")
    status, _, err = main(tmp_path / "text", "--prompt", "a")
    assert status == 2 and "is no checkpoint: it is a file" in err
    status, _, err = main(tmp_path / "text" / "a", "--prompt", "a")
    assert status == 2 and "is no checkpoint" in err
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "step_00000007" / "manifest.json").touch()
    status, _, err = main(tmp_path, "--prompt", "a")
    assert status == 2 and "is no checkpoint: it holds checkpoints, such as step_00000007" in err
    status, _, err = main(saved, "--prompt-file", tmp_path / "text")
    assert status == 2 and "it is not UTF-8" in err
    # Its tokenizer is elsewhere, or it has none of the words of the one that is named.
    for name, said in ((f"hf:{tmp_path}/gone", "is missing: "), ("byte", "has 257 tokens, and")):
        run = byte_run(kind="dense")
        model = {"vocab_size": 0 if name == "byte" else 257}
        settings = {"data": {"tokenizer": name}, "model": model}
        root = tmp_path / name.partition(":")[0]
        pool.run(1, save_with, run, settings, root)
        status, _, err = main(root, "--prompt", "a")
        assert status == 2 and said in err and "\n" not in err, err
    status, _, err = main(root, "--bench")
    assert status == 2 and "has no memory layers" in err


def save_with(run: Any, settings: dict[str, dict[str, Any]], target: Path) -> None:
    """On a rank: save a run with other settings; of bytes, too few of them."""
    import byte_models

    run = replace(run, **{section: replace(getattr(run, section), **given) for section, given in settings.items()})
    with pytest.MonkeyPatch.context() as patch:
        if run.data.tokenizer == "byte":
            patch.setattr(byte_models, "BYTE_VOCAB", 200)
        save_byte_model(run, target)


def test_bench_holds_both_models_beside_each_other(saved: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BATCH_SIZES", (1, 3)), ("_PROMPT_TOKENS", 6), ("_NEW_TOKENS", 2), ("_SECONDS", 0.0)):
        monkeypatch.setattr(bench, name, value)
    status, out, err = main(saved, "--bench", "--json", "--tables", "mapped")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [(row["phase"], row["batch_size"], row["tokens"]) for row in found["speeds"]] == [
        ("prefill", 1, 6),
        ("decode", 1, 2),
        ("prefill", 3, 6),
        ("decode", 3, 2),
    ]
    for row in found["speeds"]:
        assert len(row["memory_seconds"]) == len(row["dense_seconds"]) == 3
        tokens = row["batch_size"] * row["tokens"]
        assert row["memory_per_s"] == pytest.approx(tokens / sorted(row["memory_seconds"])[1])
        assert row["ratio"] == pytest.approx(row["memory_per_s"] / row["dense_per_s"])
    assert found["table_bytes"] == 4 * 24 * 144 and found["tables"] == "mapped"
    assert found["memory_flops"] == pytest.approx(found["dense_flops"], rel=0.04)
    _, out, _ = main(saved, "--bench")
    assert "medians of rounds in turn" in out and "memory / dense" in out and "in memory" in out


def test_dense_twin_shares_what_both_have(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with open_model(saved / "checkpoints" / "step_00000000") as opened:
        run = bench.dense_like(opened.run, opened.vocab_size)
        twin = bench.dense_twin(opened, run)
        own = dict(opened.model.chunks[0].named_parameters())
        new = []
        for name, param in twin.chunks[0].named_parameters():
            if name in own and ".mlp.linear_fc" not in name:
                assert param.data_ptr() == own[name].data_ptr()
            else:
                new.append(name)
                assert param.isfinite().all() and 0 < float(param.std()) < 0.2
        # The memory has as many FLOPs as networks of another width than the one that is left.
        assert len(new) == 8 and all(".mlp.linear_fc" in name for name in new)
        logits = bench.Forward(twin, run, opened.world, opened.vocab_size).logits(torch.arange(5)[None])
        assert logits.isfinite().all()


def test_characters_are_whole_whatever_the_tokens(tmp_path: Path) -> None:
    for spec in all_specs(tmp_path):
        encoder = load_encoder(parse_spec(spec))
        for text in AWKWARD:
            prompt, whole = "the " + text, "the " + text + text + " end"
            given = [int(token) for token in encoder.encode([whole])[0]]
            # A prompt of whole characters.
            start = next(n for n in range(1, len(given)) if encoder.decode(given[:n]) == whole[: len("the")])
            stream = TextStream(encoder, given[:start])
            pieces = [*(stream.add(token) for token in given[start:]), stream.end()]
            assert "".join(pieces) == encoder.decode(given)[len("the") :], (spec, prompt)
            assert "\ufffd" not in "".join(pieces) and pieces[-1] == ""


def test_bytes_that_are_no_characters_are_shown_in_time() -> None:
    encoder = ByteEncoder(TokenizerSpec("byte"))
    tokens = [*b"\xff\xfe\xff\xff\xe2\x82\xac\xf0\x9f", 65, *b"\xc3"]
    stream = TextStream(encoder, [97])
    pieces = [stream.add(token) for token in tokens]
    assert pieces[:3] == ["", "", ""] and pieces[3] == "\ufffd"
    assert "".join([*pieces, stream.end()]) == encoder.decode(tokens)
    assert encoder.decode(tokens) == "\ufffd\ufffd\ufffd\ufffd€\ufffdA\ufffd"
    # Nothing follows the end of a document.
    assert stream.add(encoder.eod) == ""
