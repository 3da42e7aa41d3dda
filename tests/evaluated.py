"""What tests of `mempar eval` share: a toy checkpoint that reads bytes, local tasks of every kind, workers that die."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from byte_models import byte_run, save_byte_model
from mempar.runtime import bringup

LENGTH = 48
# Three windows, the last of them with a context of more than a token.
LONG = " ".join(f"number {number} is {number**2}" for number in range(7))[:130]
QUESTIONS = [
    {"question": "one", "choices": ["A", "B", "C"], "right": 1, "text": "The first text.", "answer": "x"},
    {
        "question": "longer ",
        "choices": [" two words", "more words", "é"],
        "right": 0,
        "text": "Grüße, Leute",
        "answer": "y",
    },
    # Longer than the model reads.
    {"question": "very " * 30, "choices": ["A", "words", "B"], "right": 0, "text": LONG, "answer": "z"},
    {"question": "Größe", "choices": ["ß", "A", "sz"], "right": 2, "text": "x", "answer": "x"},
]
_COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA, train: DATA}}
test_split: test
"""
TASKS = {
    "toy_choices": """
output_type: multiple_choice
training_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "toy_writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [UNTIL], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
BAD_TASKS = {
    "toy_unsafe": TASKS["toy_writing"] + "unsafe_code: true\n",
    "toy_fetched": TASKS["toy_writing"].replace("doc_to_text", "dataset_name: main\ndoc_to_text", 1),
    "toy_failing": TASKS["toy_choices"] + "process_results: !function judging.judge\n",
    "toy_wrong": TASKS["toy_writing"].replace("{{question}}", "{{nothing.of_this_name}}"),
}


def write_tasks(folder: Path, until: str = "\n\n") -> Path:
    """A directory of tasks with their questions, a tag and a group of some of them, and tasks that cannot be."""
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, own in (TASKS | BAD_TASKS).items():
        common = _COMMON if name != "toy_fetched" else "dataset_path: nobody/nothing\ntest_split: test\n"
        tag = "tag: toys\n" if name in TASKS else ""
        text = f"task: {name}\n{tag}{common}{own}".replace("DATA", str(data)).replace("UNTIL", json.dumps(until))
        (folder / f"{name}.yaml").write_text(text)
    (folder / "group.yaml").write_text("group: toy_group\ntask: [toy_choices, {task: toy_writing, num_fewshot: 0}]\n")
    (folder / "judging.py").write_text("def judge(doc, results):\n    raise KeyError('no such answer')\n")
    return folder


def save_toy(folder: Path) -> Path:
    """Save a toy that reads bytes, in this process."""
    bringup.join_world()
    try:
        save_byte_model(byte_run(LENGTH), folder)
    finally:
        dist.destroy_process_group()
    return folder


def own_number(opened: Any, batch: Any) -> int:
    """Work: which process does it."""
    return os.getpid()


def die(opened: Any, batch: Any) -> None:
    """Work that nobody survives."""
    os.kill(os.getpid(), signal.SIGKILL)
