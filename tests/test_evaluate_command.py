"""`mempar eval`: the answers of the exported model in the harness's own class, whoever computes; the loss on data."""

import json
import math
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import typer
from typer.testing import CliRunner

from evaluated import LENGTH, QUESTIONS, die, own_number, save_toy, write_tasks
from mempar.errors import ConfigError, MemparError
from mempar.runtime.data.encoders import ByteEncoder
from mempar.runtime.data.manifest import read_index
from mempar.runtime.data.tokenizer import BYTE_VOCAB, parse_spec
from mempar.runtime.inference import tokens as vocabulary
from mempar.runtime.inference.opened import open_model
from mempar.tools.evaluate import command, options
from mempar.tools.evaluate.command import evaluate
from mempar.tools.evaluate.quiet import be_quiet
from mempar.tools.evaluate.request import Request, Results
from mempar.tools.evaluate.sizes import BatchSizes
from mempar.tools.evaluate.tasks import find_tasks, load_tasks, set_up
from mempar.tools.evaluate.workers import Map, open_workers
from mempar.tools.prepare.command import prepare

be_quiet()
pytestmark = pytest.mark.usefixtures("one_thread", "modules_apart", "no_network")

ENCODER = ByteEncoder(parse_spec("byte"))
# Likelihoods of 48 tokens in nats; float32 leaves 1e-5.
TOLERANCE = 1e-3
DEATH_SECONDS = 60


@pytest.fixture(scope="module")
def no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are made in a place of their own, and nobody is called."""
    import datasets

    called: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        called.append(address)
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("data-sets"))
        patch.setattr(socket.socket, "connect", refuse)
        yield
    assert not called


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy") / "saved")


@dataclass(frozen=True)
class Toy:
    """A checkpoint, tasks, and what the harness asks in them, by the kind of request."""

    checkpoint: Path
    tasks: Path
    requests: dict[str, list[Any]]

    def answers(self, spread: Map, batch_size: int) -> dict[str, list[Any]]:
        """The engine's answers."""
        from mempar.tools.evaluate.harness_model import HarnessModel

        sizes = BatchSizes(given=batch_size, embeddings=BYTE_VOCAB)
        model = HarnessModel(spread, ENCODER, max_length=LENGTH, sizes=sizes, seed=1)
        return {kind: getattr(model, kind)(asked) for kind, asked in self.requests.items()}


@pytest.fixture(scope="module")
def toy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    tasks = write_tasks(tmp_path_factory.mktemp("toy") / "tasks")
    manager, names = find_tasks(["toys"], [tasks])
    assert names == ["toy_choices", "toy_texts", "toy_writing"]
    loaded = load_tasks(manager, names, allow_code=False)
    set_up(loaded["tasks"], num_fewshot=None, seed=1)
    requests: dict[str, list[Any]] = defaultdict(list)
    for task in loaded["tasks"].values():
        task.build_all_requests()
        for instance in task.instances:
            requests[instance.request_type].append(instance)
    return Toy(checkpoint, tasks, requests)


@pytest.fixture(scope="module")
def answers(toy: Toy) -> dict[str, list[Any]]:
    with open_workers(toy.checkpoint, count=1, tables="memory") as spread:
        return toy.answers(spread, batch_size=3)


@pytest.fixture(scope="module")
def theirs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The answers of the exported model, through the harness's class."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_ranks import carry_out
    from mempar.tools.convert.checkpoint_source import CheckpointSource
    from mempar.tools.convert.hf.to_hf import plan_hf

    root = tmp_path_factory.mktemp("exported") / "hf"
    carry_out(plan_hf(CheckpointSource(toy.checkpoint), memory_bytes=1 << 20), root)
    exported = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True).eval()
    model = HFLM(pretrained=exported, tokenizer=AutoTokenizer.from_pretrained(root), batch_size=2)
    assert model.max_length == LENGTH
    return {kind: getattr(model, kind)(asked) for kind, asked in toy.requests.items()}


def test_likelihoods_are_those_of_the_exported_model(answers: Any, theirs: Any, note_figure: Callable) -> None:
    ours, others = answers["loglikelihood"], theirs["loglikelihood"]
    assert len(ours) == sum(len(question["choices"]) for question in QUESTIONS)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in others]
    deviation = max(abs(one - other) for (one, _), (other, _) in zip(ours, others, strict=True))
    note_figure("likelihoods in the harness, against its own class", deviation)
    assert deviation < TOLERANCE < min(-one for one, _ in ours)


def test_texts_are_scored_as_the_exported_model_scores_them(answers: Any, theirs: Any) -> None:
    assert answers["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], abs=TOLERANCE)


def test_continuations_are_those_of_the_exported_model(answers: Any, theirs: Any) -> None:
    assert answers["generate_until"] == theirs["generate_until"]
    assert len(set(answers["generate_until"])) == len(QUESTIONS) and all(answers["generate_until"])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Answers but for the order of float32 sums, which depends on how many threads a process has."""
    assert found["generate_until"] == expected["generate_until"]
    near, greedy = zip(*found["loglikelihood"], strict=True)
    expected_near, expected_greedy = zip(*expected["loglikelihood"], strict=True)
    assert greedy == expected_greedy and near == pytest.approx(expected_near, rel=1e-6)
    assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], rel=1e-6)


def test_several_workers_answer_as_one_and_die_together(toy: Toy, answers: Any) -> None:
    numbers: set[int] = set()
    with pytest.raises(MemparError, match="one of 2 workers was killed"):  # noqa: SIM117
        with open_workers(toy.checkpoint, count=2, tables="auto") as spread:
            assert_same(toy.answers(spread, batch_size=3), answers)
            numbers.update(spread(own_number, range(8)))
            list(spread(die, range(8)))
    end = time.monotonic() + DEATH_SECONDS
    while any(psutil.pid_exists(number) for number in numbers) and time.monotonic() < end:
        time.sleep(0.01)
    assert numbers and not any(psutil.pid_exists(number) for number in numbers)


def run(checkpoint: Path, **settings: Any) -> tuple[Results, list[str]]:
    said: list[str] = []
    return evaluate(Request(checkpoint=checkpoint, **settings), said.append), said


def test_command_says_and_writes_what_the_harness_found(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    settings: dict[str, Any] = {"limit": 3, "num_fewshot": 1, "batch_size": 2}
    results, said = run(toy.checkpoint, tasks=("toy_group,toy_texts",), task_dir=(toy.tasks,), out=out, **settings)
    document = json.loads(out.read_text())
    found = document["tasks"]
    assert found["toy_choices"]["questions"] == 3 and found["toy_choices"]["all_questions"] == 4
    assert found["toy_choices"]["num_fewshot"] == 1 and found["toy_writing"]["num_fewshot"] == 0
    assert 0 <= found["toy_choices"]["metrics"]["acc,none"] <= 1 and found["toy_choices"]["stderr"]["acc,none"] > 0
    assert found["toy_texts"]["metrics"]["bits_per_byte,none"] > 5
    assert document["checkpoint"]["step"] == 0 and document["checkpoint"]["run"] == "run"
    assert document["settings"].items() >= settings.items() and document["versions"]["lm-eval"] == version("lm-eval")
    text = "\n".join(said)
    assert text.startswith("run, step 0") and all(name in text for name in ("toy_choices", "toy_writing", "± "))
    assert any("toy_choices: " in note and "lost their beginnings" in note for note in results.notes)
    assert "- no examples in prompts of toy_writing" in text


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("toy_choises", "toy_choises is not known: the nearest are toy_choices"),
        ("toy_unsafe", "toy_unsafe: such tasks run programs .* give --allow-code"),
        (
            "toy_fetched",
            r"cannot be fetched .* \(nobody/nothing\), .* run the same command once",
        ),
        ("toy_wrong", r"toy_wrong cannot be loaded \(.*mend it"),
        (",", "names nothing"),
    ],
)
def test_tasks_that_cannot_be_are_refused(
    tasks: str, message: str, toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    from lm_eval.tasks import manager

    # Without it, it would be tried for half a minute.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # All of the harness's tasks take seconds to look at.
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    with pytest.raises(ConfigError, match=message):
        run(toy.checkpoint, tasks=(tasks,), task_dir=(toy.tasks,))


def test_tasks_that_fail_are_one_message_behind_the_losses(toy: Toy, data: str) -> None:
    said: list[str] = []
    request = Request(
        checkpoint=toy.checkpoint, data=(data,), samples=1, tasks=("toy_choices,toy_failing",), task_dir=(toy.tasks,),
        limit=1,
    )  # fmt: skip
    where = r"--tasks toy_failing cannot be evaluated \(KeyError: 'no such answer'; judging.py, line 2\)"
    with pytest.raises(ConfigError, match=where) as raised:
        evaluate(request, said.append)
    assert isinstance(raised.value.__cause__, KeyError) and "\n" not in str(raised.value)
    assert said[0].startswith("run, step 0") and data in said[2] and "1 of 6" in said[2]


def test_examples_are_no_more_than_there_are(toy: Toy) -> None:
    manager, names = find_tasks(["toy_choices"], [toy.tasks])
    tasks = load_tasks(manager, names, allow_code=False)["tasks"]
    assert set_up(tasks, num_fewshot=len(QUESTIONS), seed=1) == []
    with pytest.raises(ConfigError, match="toy_choices takes 5 examples in a prompt, and has 4 documents"):
        set_up(tasks, num_fewshot=len(QUESTIONS) + 1, seed=1)
    # Examples are chosen from the questions themselves.
    (task,) = tasks.values()
    task.fewshot_cfg.split = task.config.test_split
    with pytest.raises(ConfigError, match=r"has 3 documents .* use --num-fewshot 3 or less"):
        set_up(tasks, num_fewshot=len(QUESTIONS), seed=1)


def test_directories_that_hold_no_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no directory"):
        find_tasks(["any"], [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"holds no \.yaml file"):
        find_tasks(["any"], [tmp_path])
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match=r"broken.yaml cannot be read \(ParserError"):
        find_tasks(["any"], [tmp_path])


def test_continuations_may_be_drawn_and_have_room(toy: Toy) -> None:
    from mempar.tools.evaluate.harness_model import HarnessModel

    def continued(seed: int, **asked: Any) -> tuple[list[str], list[str]]:
        settings = {"until": ["\n"], "do_sample": True, "temperature": 1.0, **asked}
        requests = [SimpleNamespace(args=(text, settings), task_name="drawing") for text in ("", "a", "a")]
        with open_workers(toy.checkpoint, count=1, tables="memory") as spread:
            sizes = BatchSizes(given=2, embeddings=BYTE_VOCAB)
            model = HarnessModel(spread, ENCODER, max_length=LENGTH, sizes=sizes, seed=seed)
            return model.generate_until(requests), model.notes

    texts, notes = continued(5, max_gen_toks=8)
    assert (texts, []) == continued(5, max_gen_toks=8) and not notes
    assert len(set(texts)) == 3 and texts != continued(50, max_gen_toks=8)[0]
    texts, notes = continued(5)
    assert notes == ["drawing: continuations have at most 24 tokens, not 256: the model reads 48 tokens at a time"]
    assert max(len(text.encode()) for text in texts) > 8
    with pytest.raises(ConfigError, match="drawing asks for num_beams=4, top_k=3 in generation_kwargs"):
        continued(5, top_k=3, num_beams=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared documents: 5 windows and a bit."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"Zeile {number}: größer\n\n" for number in range(14)))
    settings: dict[str, Any] = {"tokenizer": "byte", "workers": 1, "unit": "paragraph"}
    prepare([str(folder / "text.txt")], out=folder / "few", say=lambda line: None, **settings)
    return str(folder / "few")


def test_loss_on_data_is_that_of_every_token_once(checkpoint: Path, data: str) -> None:
    tokens = np.fromfile(f"{data}.bin", dtype=read_index(data).dtype).astype(np.int64)
    stream = torch.from_numpy(np.concatenate([[ENCODER.eod], tokens]))
    nats = 0.0
    with open_model(checkpoint) as opened:
        for start in range(0, len(tokens), LENGTH):
            end = min(start + LENGTH, len(tokens))
            # The last window begins where it is full.
            read = stream[max(0, end - LENGTH) : end + 1]
            logits = opened.forward.logits(read[None, :-1], padded=True)[0]
            losses = torch.nn.functional.cross_entropy(logits, read[1:], reduction="none")
            nats += float(losses[start - end :].sum())
    results, said = run(checkpoint, data=(data,), batch_size=2)
    (loss,) = results.losses
    assert loss.tokens == len(tokens) and loss.windows == loss.all_windows == -(-len(tokens) // LENGTH)
    assert loss.nats == pytest.approx(nats, rel=1e-6) and loss.nats_per_token == loss.nats / len(tokens)
    assert loss.num_bytes == int((tokens < ENCODER.eod).sum())
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / loss.num_bytes, rel=1e-6)
    assert f"{loss.nats_per_token:.4f}" in "\n".join(said)


def test_loss_of_some_windows_and_without_a_tokenizer(
    checkpoint: Path, data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, said = run(checkpoint, data=(data,), samples=2)
    assert results.losses[0].tokens == 2 * LENGTH and "2 of 6" in "\n".join(said)

    def missing(spec: Any) -> None:
        raise ConfigError("it is not there")

    monkeypatch.setattr(vocabulary, "load_encoder", missing)
    results, said = run(checkpoint, data=(data,), samples=2, out=tmp_path / "found.json")
    assert results.losses[0].bits_per_byte is None and "- bits a byte are not known: " in "\n".join(said)
    assert json.loads((tmp_path / "found.json").read_text())["data"][0]["bits_per_byte"] is None
    with pytest.raises(ConfigError, match=r"the tokenizer of .* is missing: it is not there"):
        run(checkpoint, tasks=("any",))
    Path(f"{data}.json").rename(tmp_path / "few.json")
    with pytest.raises(ConfigError, match="it is not there"):
        run(checkpoint, data=(data,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to evaluate: --tasks A,B or --data PREFIX"),
        ({"data": ("nowhere",)}, "nowhere.bin is not there"),
        ({"data": ("x" * 300,)}, r"--data x*.bin cannot be looked at \(File name too long"),
        ({"tasks": ("x",), "task_dir": (Path("x" * 300),)}, "--task-dir x* cannot be looked at"),
        ({"data": ("x",), "out": Path("x" * 300)}, r"--out x* cannot be looked at \(File name too long"),
        ({"data": ("x",), "out": Path("x" * 252)}, r"--out x*.aside cannot be looked at \(File name too long"),
        ({"data": ("x",), "out": Path("a\0b")}, r"--out .* cannot be looked at \(embedded null byte"),
        ({"data": ("x",), "out": Path(__file__) / "below.json"}, "lies in no directory"),
        ({"data": ("x",), "samples": 0}, "--samples 0 must be at least 1"),
        ({"tasks": ("x",), "limit": 1.5}, "--limit 1.5 is neither"),
        ({"tasks": ("x",), "limit": float("inf")}, "--limit inf is neither"),
        ({"tasks": ("x",), "seed": -1}, "--seed -1 is not a number from 0"),
        ({"tasks": ("x",), "samples": 3}, "--samples without --data"),
        ({"data": ("x",), "limit": 3, "num_fewshot": 0}, "--limit, --num-fewshot without --tasks"),
        ({"data": ("x",), "tables": "disk"}, "--tables disk is not known"),
        ({"data": ("x",), "out": Path(__file__)}, "exists; nothing is overwritten"),
        ({"data": ("x",), "out": Path("no/such/file.json")}, "lies in no directory"),
    ],
)
def test_bad_requests_are_refused(settings: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(checkpoint, **settings)


def test_checkpoints_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint"):
        run(tmp_path, tasks=("any",))


def test_without_the_harness_the_extra_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'mempar\[hf\]'"):
        run(checkpoint, tasks=("any",))


def test_options_become_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(command, "evaluate", lambda request, say: asked.append(request))
    app = typer.Typer()
    app.command("eval")(options.evaluate)
    found = CliRunner().invoke(app, ["CK", "--tasks", "a,b", "--tasks", "c", "--task-dir", "d", "--limit", ".5"])
    assert found.exit_code == 0, found.output
    assert asked == [Request(checkpoint=Path("CK"), tasks=("a,b", "c"), task_dir=(Path("d"),), limit=0.5)]
