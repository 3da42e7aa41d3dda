"""The published group and figures: tasks that exist, numbers of the paper, closed-book answers; bytes of tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.tokenizer import parse_spec
from mempar.tools.evaluate.answers import exact_match, f1
from mempar.tools.evaluate.heldout import Stream, measure, text_bytes
from mempar.tools.evaluate.published import METRICS, PUBLISHED, published_for
from mempar.tools.evaluate.quiet import be_quiet
from mempar.tools.evaluate.tasks import GROUP, OURS, SAFE_GROUP, leaves
from toy_tokenizers import AWKWARD, all_specs

be_quiet()
ROOT = Path(__file__).resolve().parents[1]


def test_published_figures_stand_beside_models_of_their_size() -> None:
    found = published_for(find_recipe("1.3b_memory_plus_64m_64xh200_bf16"))
    assert [one.model for one in found] == ["1.3b dense", "1.3b Memory+ 64M"]
    assert found[1].figures == {
        "nq_open": 20.78,
        "triviaqa": 62.14,
        "piqa": 77.31,
        "openbookqa": 30.00,
        "hotpotqa_closed_book": 20.47,
    }
    models = [one.model for one in published_for(find_recipe("8b_memory_plus_16m_128xh100_bf16"))]
    assert models == ["8b dense, 200B", "8b Memory+ 16M, 200B", "8b dense", "8b Memory+ 16M"]
    assert [one.variant for one in published_for(find_recipe("134m_moe16_8xh100_bf16"))] == ["dense", "moe"]
    assert [one.variant for one in published_for(find_recipe("373m_peer_590k_16xh100_bf16"))] == ["dense", "peer"]
    assert published_for(find_recipe("smoke")) == []


def test_all_published_tasks_are_compared_by_a_metric() -> None:
    assert {task for one in PUBLISHED for task in one.figures} == METRICS.keys()
    assert all(0 < figure < 100 for one in PUBLISHED for figure in one.figures.values())
    assert len(PUBLISHED[-1].figures) == 9


def test_published_group_names_tasks_that_exist() -> None:
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = [root / name for name in METRICS if (root / name).is_dir()] + [root / "mmlu" / "default"]
    manager = tasks.TaskManager(include_path=[OURS, *folders], include_defaults=False)
    found = list(leaves(GROUP, manager.task_index))
    assert None not in found and len(found) == 8 + 57
    assert {task["task"] for task in found if task} >= METRICS.keys() - {"mmlu"}
    assert [task["task"] for task in found if task and task.get("unsafe_code")] == ["humaneval", "mbpp"]
    safe = list(leaves(SAFE_GROUP, manager.task_index))
    assert safe == found[:-2]


def test_closed_book_questions_are_asked_and_answers_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"question": "Who?", "answer": "The Beatles"}) + "\n")
    settings = load_yaml(OURS / "hotpotqa_closed_book.yaml", resolve_func=True)
    settings |= {"dataset_path": "json", "dataset_name": None}
    files = {"train": str(data), "validation": str(data)}
    task = ConfigurableTask(config={**settings, "dataset_kwargs": {"data_files": files}})
    doc = task.validation_docs()[0]
    assert task.fewshot_context(doc, 0) == "Answer these questions:\n\nQ: Who?\nA:"
    assert task.process_results(doc, ["beatles!"]) == {"exact_match": 1.0, "f1": 1.0}
    assert task.process_results(doc, ["the Beatles, I think"])["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "exact", "share"),
    [
        ("The  Beatles.", "beatles", 1.0, 1.0),
        ("John Lennon", "Lennon", 0.0, 2 / 3),
        ("Paul", "John", 0.0, 0.0),
        ("", "John", 0.0, 0.0),
        ("an", "the", 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_words(answer: str, right: str, exact: float, share: float) -> None:
    assert exact_match(answer, right) == exact and f1(answer, right) == pytest.approx(share)


def test_wheel_holds_the_tasks() -> None:
    from hatchling.builders.wheel import WheelBuilder

    held = {Path(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    ours = {path.relative_to(ROOT / "src") for path in OURS.glob("*.yaml")}
    assert len(ours) == 3 and ours <= held


def stream_of(spec: str) -> tuple[Stream, int]:
    """A data set of awkward documents, and the bytes of what its tokens stand for."""
    encoder = load_encoder(parse_spec(spec))
    documents = [[int(token) for token in tokens] for tokens in encoder.encode([*AWKWARD, *AWKWARD[:3]])]
    tokens = np.array([token for document in documents for token in [*document, encoder.eod]])
    num_bytes = sum(len(encoder.decode(document).encode()) for document in documents)
    settings = {"eod": encoder.eod, "encoder": encoder, "max_length": 7, "embeddings": encoder.vocab_size}
    return Stream(data="toy", tokens=tokens, **settings), num_bytes


def test_bytes_of_stretches_add_up_for_every_tokenizer(tmp_path: Path) -> None:
    for spec in all_specs(tmp_path):
        stream, num_bytes = stream_of(spec)
        assert stream.encoder is not None
        for length in (1, 2, 7, 50, 10**6):
            starts = range(0, len(stream.tokens), length)
            stretches = [text_bytes(stream.tokens, start, start + length, stream.encoder) for start in starts]
            assert sum(stretches) == num_bytes, (spec, length)
            assert min(stretches) >= -3


def test_windows_are_measured_all_or_evenly() -> None:
    stream, num_bytes = stream_of("byte")
    count = stream.num_windows

    def one_nat(batches):
        for rows in batches:
            assert 1 <= len(rows) <= 4
            yield [-float(len(row.endings[0])) for row in rows]

    whole = measure(stream, samples=None, batch_size=4, score=one_nat)
    assert whole.tokens == len(stream.tokens) and whole.nats_per_token == 1 and whole.num_bytes == num_bytes
    assert (whole.windows, whole.all_windows) == (count, count)
    some = measure(stream, samples=3, batch_size=4, score=one_nat)
    assert (some.windows, some.all_windows) == (3, count) and some.tokens == 21
    starts = [start // 7 for start in stream.starts(3)]
    assert starts == [count // 6, count // 2, count * 5 // 6]
    with pytest.raises(ConfigError, match="holds the token 256, and the vocabulary has 256"):
        measure(replace(stream, embeddings=256), samples=None, batch_size=4, score=one_nat)
