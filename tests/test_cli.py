"""The command line as its users meet it: help, bad input (one message, status 2), a run of one and of two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import mempar, refusal, said_as
from toy_tokenizers import byte_level

TINY = [
    "model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=64", "memory.layers=[1,3]",
    "memory.num_subkeys=16", "memory.key_dim=16", "memory.top_k=4", "memory.column_tile=8", "train.seq_length=16",
    "train.heldout_samples=24", "train.steps=2", "data.trigram_baseline=false",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "smok"], "did you mean smoke"),
        (["train", "smoke", "train.stps=3"], "did you mean train.steps"),
        (["train", "smoke", "train.steps=many"], "train.steps must be int"),
        (["train", "smoke", "memory.layers=[a]"], "memory.layers must be"),
        (["train", "smoke", "train=3"], "is a section"),
        (["train", "smoke", "train.steps"], "write KEY=VALUE"),
        (["train", "smoke", "--nproc", "0"], "starts no rank"),
        (["train", "smoke", "parallel.mp=5", "--nproc", "3"], "tp*cp*dp = 1*1*3 = 3"),
        (["train", "smoke", "parallel.tp=3"], "does not divide model.num_attention_heads=4"),
        (["train", "smoke", "parallel.cp=2"], "needs TransformerEngine"),
        (["train", "smoke", "parallel.ep=2"], "there are no experts to divide"),
        (["train", "smoke", "data.corpus=", "data.paths=[/nowhere/x]"], "/nowhere/x.bin does not exist"),
        (["train", "smoke", "data.corpus=wiki"], "built-in corpora are: stdlib"),
        (["train", "smoke", "data.corpus="], "mempar prepare"),
        (["train", "smoke", "--resume"], "--resume needs --out"),
        (["train", "smoke", "--from", "/nowhere"], "is no checkpoint"),
        (["train", "/nowhere.yaml"], "does not exist"),
        (["train", "nowhere:recipe"], "cannot be imported"),
        (["recipes", "smok"], "did you mean smoke"),
        (["train", "134m_dense_16xh100_bf16"], "did you mean 134m_dense_8xh100_bf16"),
        (["train", "smoke", "data.tokenizer=gpt2"], "the tokenizers are: byte, hf:PATH_OR_NAME, sentencepiece:FILE"),
        (["prepare", "/nowhere", "--tokenizer", "byte", "--out", "x"], "/nowhere does not exist"),
        (["prepare", "/", "--tokenizer", "gpt2", "--out", "x"], "--tokenizer=gpt2 is not known"),
    ],
    ids=said_as,
)
def test_bad_input_gets_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*arguments)
    assert not (tmp_path / "runs").exists()


def test_occupied_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: other\n")
    assert "holds a run already" in refusal("train", "smoke", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "name: other\n"


def test_recipes_lists_and_prints() -> None:
    rows = json.loads(mempar("recipes", "--json").out)
    keys = {"name", "total_params", "active_params", "memory_params", "flops_per_token", "gpus", "hardware"}
    assert all(keys <= row.keys() for row in rows)
    assert "variant: memory_plus" in mempar("recipes", "smoke").out


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = Path(sys.executable).with_name("mempar")
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=240, check=False)


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of a cache that the first run fills."""
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def test_two_ranks_train_resume_and_refuse_like_one(cache: str, tmp_path: Path) -> None:
    one = program("train", "smoke", *TINY, cache, "--out", f"{tmp_path}/one")
    assert one.returncode == 0, one.stderr
    two = program("train", "smoke", *TINY, cache, "parallel.mp=2", "--out", f"{tmp_path}/two")
    assert two.returncode == 0, two.stderr
    assert "held-out loss after 0 steps: this model" in two.stdout and "memory switched off" in two.stdout
    rows = [rows_of(tmp_path / name) for name in ("one", "two")]
    for single, pair in zip(*rows, strict=True):
        key = "loss" if "loss" in single else "heldout_loss"
        assert pair[key] == pytest.approx(single[key], rel=1e-5)
    assert json.loads((tmp_path / "two" / "launch" / "command.json").read_text())["repositories"]["mempar"]
    layout = json.loads((tmp_path / "two" / "layout.json").read_text())
    assert [rank["groups"]["memory"] for rank in layout["ranks"]] == [[0, 1], [0, 1]]
    branch = ["--from", f"{tmp_path}/two/checkpoints/step_00000002", "--out", f"{tmp_path}/branch"]
    again = program("train", "smoke", *TINY, cache, "train.steps=3", *branch)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in rows_of(tmp_path / "branch")] == [2, 3, 3]


def test_damaged_checkpoints_are_refused_and_named(cache: str, tmp_path: Path) -> None:
    run = [*TINY, cache, "parallel.mp=2", "--out", f"{tmp_path}/run"]
    trained = program("train", "smoke", *run)
    assert trained.returncode == 0, trained.stderr
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    # A run stands for its newest checkpoint.
    assert "step_00000002 is whole: step 2," in program("verify", str(tmp_path / "run")).stdout
    (damaged, *_) = (saved / "tables" / "memory.values.exp_avg").iterdir()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    before = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    branch = ["--from", str(saved), "--out", f"{tmp_path}/branch"]
    for arguments in (
        ["train", "smoke", *run, "train.steps=3", "--resume"],
        ["train", "smoke", *TINY, cache, "train.steps=3", *branch],
        ["verify", str(saved)],
    ):
        refused = program(*arguments)
        assert refused.returncode == (1 if arguments[0] == "verify" else 2)
        assert f"{damaged} is damaged: the checksum of memory.values.exp_avg, rows " in refused.stderr
        assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_experts_train_and_are_continued_on_other_ranks(cache: str, tmp_path: Path) -> None:
    experts = [*TINY, cache, "memory.enabled=false", "moe.num_experts=4", "moe.ffn_hidden_size=32", "moe.layers=[1,3]"]
    two = program("train", "smoke", *experts, "parallel.ep=2", "--out", f"{tmp_path}/two")
    assert two.returncode == 0, two.stderr
    assert "4 experts in each of the blocks 1, 3, 2 on each rank (ep=2)" in two.stdout
    layout = json.loads((tmp_path / "two" / "layout.json").read_text())
    assert layout["sizes"]["ep"] == 2
    assert [rank["groups"]["expert"] for rank in layout["ranks"]] == [[0, 1], [0, 1]]
    branch = ["--from", f"{tmp_path}/two/checkpoints/step_00000002", "--out", f"{tmp_path}/branch"]
    again = program("train", "smoke", *experts, "train.steps=3", *branch)
    assert again.returncode == 0, again.stderr
    rows = {name: rows_of(tmp_path / name) for name in ("two", "branch")}
    ended, begun = rows["two"][-1]["heldout_loss"], rows["branch"][0]["heldout_loss"]
    assert begun == pytest.approx(ended, rel=1e-6)


def test_blend_of_prepared_data_trains_and_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = f"hf:{byte_level(tmp_path / 'hf')}"
    for name, repeats in (("a", 400), ("b", 50)):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}, the memory and the rows of the table\n" * repeats)
        made = program("prepare", f"{tmp_path}/{name}.txt", "--tokenizer", tokenizer, "--out", f"{tmp_path}/{name}")
        assert made.returncode == 0, made.stderr
        assert f"tokens of {tokenizer} (vocabulary 300, end of document 0), uint16" in made.stdout
    data = [
        "data.corpus=", f"data.paths=[{tmp_path}/a,{tmp_path}/b]", "data.weights=[0.25,0.75]",
        f"data.heldout_paths=[{tmp_path}/b]", f"data.tokenizer={tokenizer}",
    ]  # fmt: skip
    whole = program("train", "smoke", *TINY, *data, "train.steps=3", "--out", f"{tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    assert all(row["loss"] < 7 for row in rows_of(tmp_path / "whole") if "loss" in row)
    refused = program("train", "smoke", *TINY, *data[:-1], "--out", f"{tmp_path}/refused")
    assert refused.returncode == 2 and "was prepared with hf:" in refused.stderr
    assert not (tmp_path / "refused").exists()
