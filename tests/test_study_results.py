"""mempar.tools.study.results, summary, directory and page: what runs leave behind, in words, tables and plots."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from command_line import mempar, refusal
from mempar.errors import ConfigError
from mempar.tools.study.comparison import Results, mean_of
from mempar.tools.study.directory import StudyDir
from mempar.tools.study.page.document import models_table, render_page, write_page
from mempar.tools.study.page.plots import all_plots
from mempar.tools.study.results import Result, gather_results, in_order, load_results, result_of, save_results
from mempar.tools.study.summary import short, summarise, title
from mempar.tools.study.variants import Entrant
from page_reader import HOSTILE, read_page
from study_runs import MICRO, made_up_result, made_up_results

PLUS = Entrant(variant="memory_plus", slots=16384)
DENSE = Entrant(variant="dense")


def written(folder: Path) -> StudyDir:
    """A study's directory with made-up results."""
    paths = StudyDir(folder)
    paths.open("quick", MICRO)
    save_results(paths.results, made_up_results())
    return paths


def test_results_come_back_as_they_were_one_object_a_run(tmp_path: Path) -> None:
    results = in_order(made_up_results())
    paths = written(tmp_path)
    assert load_results(paths.results) == results
    rows = json.loads(paths.results.read_text())
    assert len(rows) == len(results)
    for row in rows:
        assert {"variant", "slots", "seed", "params", "flops_per_token", "steps", "accuracy", "loss"} <= set(row)
    for result in results:
        folder = tmp_path / "runs" / f"{result.entrant}-{result.seed}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    assert gather_results(paths.runs) == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "sparse"}, "'sparse' is not known"),
        ({"accuracy": 1.5}, "from 0 to 1"),
        ({"accuracy": "high"}, "TypeError"),
        ({"loss": math.inf}, "finite"),
        ({"steps": -1}, "whole numbers"),
        ({"params": 10**400}, "whole numbers"),
        ({"flops_per_token": 0}, "at least 1"),
        ({"loss": 10**400}, "OverflowError"),
        ({"by_kind": None}, "AttributeError|TypeError|no result"),
        ({"curve": [{"step": 1}]}, "accuracy"),
        ({"seconds": None}, "TypeError"),
        ({"cpu_seconds": -1.0}, "not negative"),
        ({"model": {"ffn_hidden_size": 1.5, "lr": 0.1}}, "whole numbers"),
        ({"model": []}, "ffn_hidden_size"),
        ({"device": 3}, "has a name"),
    ],
)
def test_results_that_cannot_be_are_one_message(change: dict[str, Any], message: str) -> None:
    row = dataclasses.asdict(made_up_result("dense", 0, 1, 0.5)) | change
    with pytest.raises(ConfigError, match=message):
        result_of(row, Path("here"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "dense with seed 1 is there twice"),
        ({"seed": 2, "steps": 400}, "dense with seed 2 has 400 steps where dense has 300"),
        ({"seed": 2, "params": 1}, "dense with seed 2 is built otherwise than with seed 1"),
    ],
)
def test_runs_that_are_not_of_one_study_are_not_joined(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    one = made_up_result("dense", 0, 1, 0.5)
    path = tmp_path / "results.json"
    save_results(path, [one, dataclasses.replace(one, **change)])
    with pytest.raises(ConfigError, match=message):
        load_results(path)


def test_results_of_before_skipped_steps_were_counted_are_read() -> None:
    row = dataclasses.asdict(made_up_result("dense", 0, 1, 0.5))
    del row["skipped"]
    assert result_of(row, Path("here")).skipped == 0


def test_files_that_are_no_results_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ConfigError, match="does not exist"):
        load_results(path)
    for content in ("{", "[]", '{"a": 1}', "[1]", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"results\.json"):
            load_results(path)


def test_means_and_intervals_are_those_of_the_books() -> None:
    mean = mean_of([0.1, 0.2, 0.3])
    assert mean.value == pytest.approx(0.2) and mean.deviation == pytest.approx(0.1)
    assert str(mean) == "0.200 ± 0.100" and str(mean_of([0.5])) == "0.500"
    found = Results(
        [made_up_result("dense", 0, seed, 0.4) for seed in (1, 2, 3)]
        + [made_up_result("memory_plus", 1024, seed, 0.5 + 0.1 * seed) for seed in (1, 2, 3, 4)]
    )
    by = found.difference(Entrant(variant="memory_plus", slots=1024), DENSE, lambda run: run.accuracy)
    assert by is not None and by.count == 3 and by.value == pytest.approx(0.3)
    # 4.303 times .1 by the root of 3.
    assert by.margin == pytest.approx(0.2484, abs=1e-4) and by.is_clear
    # 12 seeds: 2.201 times the deviation of 1 to 12 by the root of 12.
    many = Results(
        [made_up_result("dense", 0, seed, 0.4) for seed in range(1, 13)]
        + [made_up_result("moe", 16, seed, 0.4 + 0.01 * seed) for seed in range(1, 13)]
    )
    by = many.difference(Entrant(variant="moe", slots=16), DENSE, lambda run: run.accuracy)
    assert by is not None and by.margin == pytest.approx(2.20099 * 0.0360555 / 12**0.5, rel=1e-4)
    single = Results([made_up_result("dense", 0, 1, 0.4), made_up_result("moe", 16, 1, 0.6)])
    alone = single.difference(Entrant(variant="moe", slots=16), DENSE, lambda run: run.accuracy)
    assert alone is not None and not alone.is_clear
    assert single.difference(PLUS, DENSE, lambda run: run.accuracy) is None


def test_paragraph_says_who_wins_by_how_much_and_where_memory_does_not_help() -> None:
    text = summarise(made_up_results())
    for said in (
        "Memory+ with 16,384 slots recalls 62.0% (±1.0) of the facts",
        "the dense model of as many FLOPs a token 42.0% (±1.0), 20.0 points more (95% interval +20.0 to +20.0)",
        "The dense model of twice the compute recalls 54.0%",
        "With as many parameters experts recall 57.0% (±1.0) and Memory+ with 16,384 slots 62.0% (±1.0), 5.0 points",
        "PEER recalls 52.0%",
        "From 1,024 to 16,384 slots Memory+ goes from 46.0% (±1.0) to 62.0% (±1.0)",
        "Not clearly above the dense model: Memory with 1,024 slots",
        "not clearly better than that at these kinds of facts: block",
        "took 2.0 times the processor time of the dense model here",
    ):
        assert said in text, said
    on_gpu = [dataclasses.replace(result, device="cuda") for result in made_up_results()]
    assert "took 1.0 times as long as the dense model here" in summarise(on_gpu)


def test_paragraph_does_not_claim_what_chance_may_have_done() -> None:
    apart = (0.0, 0.2, 0.1)
    text = summarise(
        [made_up_result("dense", 0, seed, 0.4) for seed in (1, 2, 3)]
        + [made_up_result("memory_plus", 4096, seed, 0.35 + apart[seed - 1]) for seed in (1, 2, 3)]
    )
    assert "no clear difference (5.0 points more, 95% interval -19.8 to +29.8)" in text
    assert "Not clearly above the dense model: Memory+ with 4,096 slots." in text
    worse = summarise(
        [made_up_result(*of, 0.5 + 0.001 * seed) for of in (("dense", 0, 1), ("dense", 0, 2)) for seed in of[2:]]
        + [made_up_result("memory_plus", 4096, seed, 0.3 + 0.001 * seed) for seed in (1, 2)]
    )
    assert "20.0 points fewer" in worse
    even = [made_up_result("dense", 0, 1, 0.4), made_up_result("memory_plus", 4096, 1, 0.4)]
    assert "40.0%, as many (one seed)." in summarise(even)
    some = [result for result in made_up_results() if result.variant == "dense" or result.seed == 1]
    assert "(means of 1 to 3 seeds, ± their standard deviation)" in summarise(some)
    assert "20.0 points more (one seed)" in summarise(some) and "One seed does not tell" in summarise(some)
    assert "One seed does not tell" in summarise(made_up_results(1)) and "95%" not in summarise(made_up_results(1))
    assert summarise([made_up_result("moe", 4096, 1, 0.5)]).count("MoE 50.0%") == 1


def test_paragraph_compares_the_largest_table_with_the_most_seeds() -> None:
    # Not the best: that of several would be ahead by chance.
    results = [made_up_result(*of, 0.5 + 0.01 * seed) for of in (("dense", 0, 1), ("dense", 0, 2)) for seed in of[2:]]
    for slots, recalled, seeds in ((1024, 0.8, (1, 2)), (4096, 0.6, (1, 2)), (16384, 0.9, (1,))):
        results += [made_up_result("memory_plus", slots, seed, recalled) for seed in seeds]
    text = summarise(results)
    assert "Memory+ with 4,096 slots recalls 60.0%" in text and "Memory+ with 1,024 slots recalls" not in text
    assert Results(results).best_of("memory_plus") == Entrant(variant="memory_plus", slots=1024)
    assert Results(results).best_of("moe") is None is Results(results).largest_of("moe")


def test_paragraph_says_what_is_not_as_large_and_what_was_skipped() -> None:
    def changed(result: Result) -> Result:
        of_moe = {"params": result.params // 2} if result.variant == "moe" else {}
        return dataclasses.replace(result, **of_moe, skipped=2 if result.variant == "dense" else 0)

    text = summarise([changed(result) for result in made_up_results()])
    assert "experts recall" not in text and "PEER recalls" in text
    assert "6 steps of 3 runs changed nothing: gradients were not finite." in text
    assert "changed nothing" not in summarise(made_up_results())


def test_page_stands_alone_and_shows_all(tmp_path: Path) -> None:
    paths = written(tmp_path)
    assert write_page(paths, load_results(paths.results)) == paths.page
    text = paths.page.read_text()
    page = read_page(text)
    assert list(page.titles) == [
        "accuracy-by-slots",
        "accuracy-by-params",
        "accuracy-by-steps",
        "accuracy-by-compute",
        "loss-by-steps",
        "coverage-by-slots",
        "accuracy-by-kind",
    ]
    assert page.drawn == set(page.titles)
    assert summarise(made_up_results())[:60] in "".join(page.texts["p"])
    assert paths.picture.read_bytes().startswith(b"\x89PNG") and len(paths.picture.read_bytes()) > 20_000
    assert "Memory+, 16,384 slots" in page.texts["td"] and "0.620 ± 0.010" in page.texts["td"]
    # What issue and readers want to know of each model, and of all of them.
    for said in ("8, 2 a token", "1 x 16,384", "0.003", "0.006", "1,328,576", "1,048,576", "2.000", "172"):
        assert said in page.texts["td"], said
    assert "1, 2, 3" in page.texts["td"] and "batch_size" in page.texts["th"]
    assert "quick study: 24 runs of 8 models" in page.texts["p"]


@pytest.mark.parametrize("variants", [["dense"], ["memory"], ["moe", "peer"], ["memory_plus", "dense"]])
def test_page_of_a_part_of_the_models_says_what_there_is_not(variants: list[str]) -> None:
    results = [result for result in made_up_results(1) if result.variant in variants]
    page = read_page(render_page(results, None))
    assert len(page.titles) == len(all_plots(Results(results)))
    if variants == ["dense"]:
        assert "no size to compare" in page.titles["accuracy-by-slots"]
        assert "no coverage" in page.titles["coverage-by-slots"]
    assert "–" in models_table(Results(results))  # noqa: RUF001


def test_nothing_of_a_file_becomes_markup() -> None:
    hostile = [dataclasses.replace(result, by_kind={HOSTILE: 0.5}) for result in made_up_results(1)]
    description = {"size": HOSTILE, "settings": {HOSTILE: HOSTILE}, "sources": {HOSTILE: HOSTILE}}
    page = read_page(render_page(hostile, description))
    assert HOSTILE in page.texts["th"] and HOSTILE in page.texts["td"]
    assert not [tag for tag, _ in page.elements if tag == "script"]


def test_report_is_drawn_again_from_results_alone(tmp_path: Path) -> None:
    save_results(tmp_path / "results.json", made_up_results(1)[-2:])
    said = mempar("study", "recall", "--report", str(tmp_path))
    assert said.status == 0 and f"drawn in {tmp_path / 'report.html'}" in said.out, said
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "plots.png", "summary.txt"}
    page = read_page((tmp_path / "report.html").read_text())
    assert "Settings" not in page.texts["h2"] and {"Results", "Models"} <= set(page.texts["h2"])
    assert "does not exist" in refusal("study", "recall", "--report", str(tmp_path / "none"))
    assert "give it alone" in refusal("study", "recall", "steps=3", "--report", str(tmp_path))
    (tmp_path / "study.json").write_text("{")
    assert "study.json cannot be read" in refusal("study", "recall", "--report", str(tmp_path))


def test_directory_of_another_study_is_refused(tmp_path: Path) -> None:
    paths = StudyDir(tmp_path / "a")
    paths.open("quick", MICRO)
    (paths.runs / "dense-seed1").mkdir()
    paths.open("quick", MICRO)
    with pytest.raises(ConfigError, match="holds another study: steps is 6 there and 7 here"):
        paths.open("quick", dataclasses.replace(MICRO, steps=7))
    found = json.loads(paths.description.read_text())
    other = copy.deepcopy(found)
    other["sources"]["unicode"] = "1.0.0"
    paths.description.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=re.escape("unicode is 1.0.0 there")):
        paths.open("quick", MICRO)
    for content in ("{", "[]", "3"):
        paths.description.write_text(content)
        with pytest.raises(ConfigError):
            paths.open("quick", MICRO)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not the directory of a study"):
        StudyDir(tmp_path / "b").open("quick", MICRO)
    (tmp_path / "c").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        StudyDir(tmp_path / "c").open("quick", MICRO)


def test_directory_in_which_nothing_was_run_takes_other_settings(tmp_path: Path) -> None:
    paths = StudyDir(tmp_path)
    paths.open("quick", MICRO)
    (paths.corpus / "tokenizer").mkdir(parents=True)
    paths.open("quick", MICRO)
    assert paths.corpus.exists()
    paths.open("quick", dataclasses.replace(MICRO, steps=7))
    assert not paths.corpus.exists() and json.loads(paths.description.read_text())["settings"]["steps"] == 7
    # Results without their runs are kept.
    save_results(paths.results, made_up_results(1))
    with pytest.raises(ConfigError, match="without its runs"):
        paths.open("quick", dataclasses.replace(MICRO, steps=7))


def test_models_have_names() -> None:
    results = made_up_results(1)
    assert title(PLUS, Results(results)) == "Memory+, 16,384 slots"
    peer = Entrant(variant="peer", slots=16384)
    assert title(peer, Results(results)) == short("peer") == "PEER"
    more = [*results, made_up_result("peer", 4, 1, 0.5)]
    assert title(peer, Results(more)) == "PEER, as 16,384 slots"
