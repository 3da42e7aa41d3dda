"""`mempar inspect` on a trained toy with two memories: what it says equals a brute-force count, in every layout."""

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from inspection_runs import STEPS, choices, inspected, make_run, save_initial, train_and_save, write_data
from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.config import RunConfig
from mempar.tools.convert import command as conversion
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.inspection import command
from mempar.tools.inspection.command import FINDINGS, PAGE, PICTURE, Request
from mempar.tools.inspection.options import inspect
from mempar.tools.inspection.texts import Asked
from page_reader import HOSTILE, read_page
from rank_pool import RankPool
from toy import toy_run

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 16
ONE, OTHER = "memory layers", "memory tables!!"
# Windows of 16 tokens: two whole ones and a short one.
LONG = "a sparse table of many slots, read by a few"
# Of a memory, in their order on the page.
PLOTS = ["ages", "values-norms", "reads", "entropies", "overlap", "shared", "heads-0", "slots-0", "heads-1", "slots-1"]


@dataclass
class Trained:
    """A checkpoint, the slots that each step read by the memory's name, and its value tables."""

    run: RunConfig
    path: Path
    slots: dict[str, list[np.ndarray]]
    tables: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trained(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run, path = make_run(), tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000003"
    ((slots, tables),) = pool.run(1, train_and_save, run, path)
    return Trained(run, path, slots, tables)


def texts_of(*sources: str) -> tuple[Asked, ...]:
    return tuple(Asked(kind="text", source=source) for source in sources)


def look(pool: RankPool, path: Path, *texts: Asked, **settings: Any) -> dict[str, Any]:
    (said,) = pool.run(1, inspected, path, texts, settings)
    return json.loads(said)


@pytest.fixture(scope="module")
def compared(trained: Trained, pool: RankPool) -> dict[str, Any]:
    """What is found with all options and two texts."""
    return look(pool, trained.path, *texts_of(ONE, OTHER), rows="all", top=3)


def test_reads_equal_a_brute_force_count(trained: Trained, pool: RankPool) -> None:
    tokens = list(LONG.encode())
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    (found,) = pool.run(1, choices, trained.path, windows)
    said = look(pool, trained.path, *texts_of(LONG), top=3)
    assert said["texts"][0] == {
        "name": f'"{LONG[:39]}…"',
        "tokens": len(LONG),
        "windows": 3,
        "left_out": "",
        "shown": [letter.replace(" ", "␣") for letter in LONG[:WINDOW]],
    }
    for memory, config in zip(said["memories"], trained.run.memories.values(), strict=True):
        (reads,) = memory["reads"]
        lookups = [window[block] for window in found for block in config.layers]
        counts = Counter(np.concatenate([slots.ravel() for slots, _ in lookups]).tolist())
        assert reads["histogram"] == [list(pair) for pair in sorted(Counter(counts.values()).items())]
        figures = reads["figures"]
        assert figures["reads"] == len(LONG) * len(config.layers) * config.heads * config.top_k
        assert figures["coverage"] == len(counts) / config.num_slots
        assert figures["busiest_slot_reads"] == max(counts.values())
        top = sorted(counts.values(), reverse=True)[: -(-config.num_slots // 100)]
        assert figures["busiest_percent_share"] == pytest.approx(sum(top) / figures["reads"])
        parts = np.array(list(counts.values())) / figures["reads"]
        assert figures["effective_slots_share"] == pytest.approx(
            math.exp(-(parts * np.log(parts)).sum()) / config.num_slots
        )
        for block in config.layers:
            weights = np.concatenate([window[block][1] for window in found])
            entropies = -(weights * np.log(weights)).sum(2).mean(0)
            for head, entropy in enumerate(entropies):
                assert figures[f"entropy/block_{block}/head_{head}"] == pytest.approx(entropy, abs=1e-5)
        check_lookups(reads, found[0], config.layers)
        weight: Counter[int] = Counter()
        for slots, weights in lookups:
            for slot, each in zip(slots.ravel().tolist(), weights.ravel().tolist(), strict=True):
                weight[slot] += each
        for slot in reads["slots"]:
            assert slot["reads"] == counts[slot["slot"]]
            assert slot["share"] == pytest.approx(weight[slot["slot"]] / sum(weight.values()), abs=1e-5)
        assert reads["slots"][0]["share"] == pytest.approx(max(weight.values()) / sum(weight.values()), abs=1e-5)


def check_lookups(
    reads: dict[str, Any], window: dict[int, tuple[np.ndarray, np.ndarray]], blocks: tuple[int, ...]
) -> None:
    """Slots of each token, and heat maps."""
    assert [layer["block"] for layer in reads["layers"]] == list(blocks)
    for layer in reads["layers"]:
        slots, weights = window[layer["block"]]
        np.testing.assert_allclose(layer["peaks"], weights.max(2), atol=1e-5)
        for place, of_token in enumerate(layer["tokens"]):
            sums: Counter[int] = Counter()
            for slot, weight in zip(slots[place].ravel().tolist(), weights[place].ravel().tolist(), strict=True):
                sums[slot] += weight
            assert len(of_token) == 3 and [weight for _, weight in of_token] == pytest.approx(
                sorted(sums.values(), reverse=True)[:3], abs=1e-5
            )
            assert all(sums[slot] == pytest.approx(weight, abs=1e-5) for slot, weight in of_token)
    for slot in reads["slots"]:
        peaks = np.max([np.where(slots == slot["slot"], weights, 0).max((1, 2)) for slots, weights in
                        (window[block] for block in blocks)], axis=0)  # fmt: skip
        np.testing.assert_allclose(slot["peaks"], peaks, atol=1e-5)


def test_history_and_rows_equal_a_brute_force_count(trained: Trained, compared: dict[str, Any]) -> None:
    dead = []
    for memory, (name, config) in zip(compared["memories"], trained.run.memories.items(), strict=True):
        last = np.zeros(config.num_slots, dtype=int)
        for step, slots in enumerate(trained.slots[name], 1):
            last[slots.ravel()] = step
        dead.append(int((last == 0).sum()))
        assert memory["history"]["figures"] == {
            "coverage": float((last > STEPS - 2).mean()),
            "coverage_steps": 2,
            "dead_slots": dead[-1],
            "dead_since_step": 0,
        }
        by_age = Counter((STEPS - last[last > 0]).tolist())
        assert memory["history"]["ages"] == [[age, by_age[age]] for age in sorted(by_age)]
        assert [rows["table"] for rows in memory["rows"]] == [f"{name}.{part}" for part in config.table_names]
        for rows in memory["rows"]:
            norms = np.linalg.norm(trained.tables[rows["table"]].astype(np.float64), axis=1)
            assert rows["rows"] == rows["num_rows"] == config.num_slots
            assert [rows["smallest"], rows["mean"], rows["largest"]] == pytest.approx(
                [norms.min(), norms.mean(), norms.max()]
            )
            assert sum(number for _, _, number, _ in rows["norms"]) == config.num_slots
            for low, high, number, _ in rows["norms"]:
                assert number == ((norms >= low) & (norms < high)).sum()
            # Rows that no step read are those that no step changed.
            assert rows["initial_rows"] == dead[-1] == sum(initial for *_, initial in rows["norms"])
            assert rows["zero_rows"] == rows["not_finite_rows"] == 0
    assert dead[0] > 0


def without_place(found: dict[str, Any]) -> dict[str, Any]:
    """Findings without what says where and when they were found; means are sums in the order of the blocks."""
    memories = [
        {**memory, "rows": [{**rows, "mean": pytest.approx(rows["mean"], rel=1e-12)} for rows in memory["rows"]]}
        for memory in found["memories"]
    ]
    return {**found, "memories": memories, "checkpoint": "", "date": ""}


def test_every_layout_is_inspected_alike(
    trained: Trained, compared: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    for name, assignments in (("rows", ["mp=2", "mp_rows=2"]), ("columns", ["mp=3", "mp_rows=1"])):
        conversion.convert(
            trained.path, tmp_path / name, assignments, form="mempar", weights_only=False, dtype="", max_memory="1GiB",
            workers=1, resume=False, dry_run=False, say=lambda line: None,
        )  # fmt: skip
        found = look(pool, tmp_path / name, *texts_of(ONE, OTHER), rows="all", top=3)
        assert found | {"checkpoint": "", "date": ""} == without_place(compared)


def test_a_text_overlaps_with_itself_wholly(trained: Trained, compared: dict[str, Any], pool: RankPool) -> None:
    for memory in look(pool, trained.path, *texts_of(ONE, ONE))["memories"]:
        overlap = memory["overlap"]
        assert overlap["jaccard"] == 1.0 and overlap["cosine"] == pytest.approx(1.0)
        assert all(each["jaccard"] == 1.0 and each["cosine"] == pytest.approx(1.0) for each in overlap["heads"])
        assert overlap["shared_weight"] == pytest.approx([1.0, 1.0]) and overlap["nearest"] == [[], []]
    memory = compared["memories"][0]
    assert memory["overlap"]["jaccard"] < 1.0
    values, (one, other) = trained.tables["memory.values"], memory["overlap"]["nearest"]
    for near in (*one, *other):
        a, b = values[near["slot"]].astype(np.float64), values[near["nearest"]].astype(np.float64)
        assert near["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert one and not {near["slot"] for near in one} & {near["nearest"] for near in one}


def test_page_tables_and_picture_say_the_same(
    trained: Trained, compared: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    out, (hostile,) = tmp_path / "made" / "out", texts_of(HOSTILE[:-1])
    settings = {"rows": "all", "top": 3, "out": out, "as_json": False, "memory": "memory"}
    (said,) = pool.run(1, inspected, trained.path, (hostile, *texts_of(OTHER)), settings)
    assert sorted(path.name for path in out.iterdir()) == sorted([PAGE, PICTURE, FINDINGS])
    page = read_page((out / PAGE).read_text())
    assert not page.texts.get("script")
    assert list(page.titles) == [f"memory-{plot}" for plot in PLOTS]
    assert page.drawn == set(page.titles)
    assert page.texts["h1"] == ["Memories of toy <b>&amp;$x^2$, step 3"]
    figures = compared["memories"][0]["history"]["figures"]
    assert f"{figures['dead_slots']:,}" in page.texts["strong"]
    assert "block 1" in page.texts["th"] and "<" in page.texts["td"]
    assert "memory: memory_plus, 1,369 slots of 24 numbers" in said and "memory1" not in said
    assert f"{figures['dead_slots']:,} ({figures['dead_slots'] / 1369:.1%}) never" in said
    assert "\x1b" not in said and "slot of the first alone" in said
    assert json.loads((out / FINDINGS).read_text())["memories"][0]["history"] == compared["memories"][0]["history"]
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bare(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a checkpoint of initial values, without a history, whose tokenizer is not there."""
    run = toy_run(kind="memory", memory={"usage_interval": 0})
    run = replace(run, data=replace(run.data, tokenizer="sentencepiece:/nowhere/toy.model"))
    directory = tmp_path_factory.mktemp("bare")
    pool.run(1, save_initial, run, directory / "checkpoints" / "step_00000000")
    return directory


def test_data_are_read_without_a_tokenizer_and_rows_without_a_history(
    bare: Path, pool: RankPool, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", [[place % 61 for place in range(100)], [7] * 30])
    found = look(pool, bare, data, samples=3, rows="50")
    # 130 tokens are eight samples of 16 and a label.
    text = found["texts"][0]
    assert (text["tokens"], text["windows"], text["left_out"]) == (48, 3, "5 of 8 samples")
    assert all(0 <= int(token) < 61 for token in text["shown"])
    (memory,) = found["memories"]
    assert memory["history"] is None and memory["overlap"] is None
    assert memory["rows"][0]["rows"] == memory["rows"][0]["initial_rows"] == 50 < memory["rows"][0]["num_rows"]
    (said,) = pool.run(1, inspected, bare, (data,), {"as_json": False, "out": tmp_path / "out"})
    assert "no history of its rows" in said and "50" not in said.split("no history")[0]
    page = read_page((tmp_path / "out" / PAGE).read_text())
    assert page.titles["memory-ages"] == "memory: there is no history of its rows to show."


def test_long_texts_are_read_in_windows_and_what_is_left_out_is_said(
    trained: Trained, pool: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Zwölf\n" * 60)
    found = look(pool, trained.path, Asked(kind="file", source=str(tmp_path / "text.txt")), *texts_of(LONG), samples=2)
    file, text = found["texts"]
    assert (file["windows"], file["tokens"], text["tokens"]) == (2, 32, 32)
    assert file["left_out"] == "388 tokens after the first 2 windows of 16"
    assert file["shown"][:7] == ["Z", "w", "�", "�", "l", "f", "⏎"]
    assert text["left_out"] == f"{len(LONG) - 32} tokens after the first 2 windows of 16"
    found = look(pool, trained.path, Asked(kind="file", source=str(tmp_path / "text.txt")), samples=1)
    assert found["texts"][0]["left_out"] == "the rest of the file after the first 1 window of 16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": texts_of("")}, "--text is empty; a text of at least one token"),
        ({"texts": texts_of("\udcff")}, "--text is not UTF-8"),
        ({"texts": texts_of("a", "b", "c")}, r"3 texts are given \(--text, --text, --text\)"),
        ({"texts": (Asked(kind="file", source="/nowhere/text"),)}, "--file /nowhere/text: there is no such file"),
        ({"texts": (Asked(kind="data", source="/nowhere/data"),)}, "/nowhere/data.bin is not there"),
        ({"memory": "memry1"}, "no memory of this name; .* use memory1 or memory"),
        ({"memory": "zzz"}, "use memory or memory1"),
        ({"samples": 0}, "--samples 0 must be at least 1"),
        ({"rows": "many"}, "--rows many is neither a number of at least 1 nor `all`"),
        ({"rows": "0"}, "--rows 0 is neither"),
        ({"out": Path(__file__)}, "cannot be written .it is no directory"),
        ({"out": Path("x" * 300)}, r"--out x* cannot be looked at \(File name too long"),
        ({"out": Path(__file__) / "below"}, "cannot be written .Not a directory"),
        ({"texts": (Asked(kind="file", source="x" * 300),)}, r"--file x* cannot be looked at \(File name too long"),
        ({"texts": (Asked(kind="data", source="a\0b"),)}, r"--data .* cannot be looked at \(embedded null byte"),
        ({"checkpoint": Path("/nowhere")}, "/nowhere is no checkpoint"),
        ({"checkpoint": Path("x" * 300)}, "is no checkpoint: no file has so long a name"),
    ],
)
def test_bad_input_is_one_message(settings: dict[str, Any], message: str, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        command.inspect(Request(**{"checkpoint": trained.path, **settings}), print)
    assert raised.value.exit_status == 2 and "\n" not in str(raised.value)


def test_texts_that_cannot_be_read_are_one_message(bare: Path, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    latin, empty = (Asked(kind="file", source=str(tmp_path / name)) for name in ("latin.txt", "empty.txt"))
    for path, asked, message in [
        (trained.path, latin, r"latin.txt cannot be read \(it is not UTF-8\)"),
        (trained.path, empty, "empty.txt is empty"),
        (bare, *texts_of("words"), "toy.model does not exist, which the tokenizer"),
        # Beyond the vocabulary: another tokenizer's.
        (trained.path, write_data(tmp_path / "data", [[60_000] * 40]), "60000"),
    ]:
        with pytest.raises(ConfigError, match=message):
            command.inspect(Request(checkpoint=path, texts=(asked,)), print)


def test_dense_models_have_nothing_to_inspect(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_00000000"
    pool.run(1, save_initial, toy_run(kind="dense"), path)
    with pytest.raises(ConfigError, match=r"has no memory: .* memory.enabled=false"):
        command.inspect(Request(checkpoint=path), print)


def test_damage_is_found_where_it_is_read(trained: Trained, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    for name, settings in (("memory.last_read", {}), ("memory1.down", {"rows": "all"})):
        (file,) = (copy / "tables" / name).iterdir()
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}.* is damaged"):
            command.inspect(Request(checkpoint=copy, **settings), print)
        shutil.copy(trained.path / file.relative_to(copy), file)


def test_tables_of_another_shape_than_the_run_says_are_one_message(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfAnotherRun(CheckpointSource):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.run = replace(self.run, memory=replace(self.run.memory, num_subkeys=38))

    monkeypatch.setattr(command, "CheckpointSource", OfAnotherRun)
    monkeypatch.setattr(command, "history_name", lambda source, name: "")
    with pytest.raises(CheckpointError, match=r"not hold memory.values as float32 \[1444, 24\], but float32 \[1369"):
        command.inspect(Request(checkpoint=trained.path, rows="5"), print)


def test_options_become_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(command, "inspect", lambda request, say: asked.append(request))
    app = typer.Typer()
    app.command()(inspect)
    options = ["--text", "a", "--file", "f", "--samples", "7", "--rows", "all", "--memory", "memory", "--top", "9"]
    assert CliRunner().invoke(app, ["ckpt", *options, "--json", "--out", str(tmp_path)]).exit_code == 0
    assert CliRunner().invoke(app, ["ckpt", "--data", "p"]).exit_code == 0
    assert asked[0] == Request(
        checkpoint=Path("ckpt"), texts=(Asked(kind="text", source="a"), Asked(kind="file", source="f")), samples=7,
        rows="all", memory="memory", top=9, as_json=True, out=tmp_path,
    )  # fmt: skip
    assert asked[1] == Request(checkpoint=Path("ckpt"), texts=(Asked(kind="data", source="p"),))


def test_page_needs_matplotlib_before_anything_is_read(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"inspection.html is not written: matplotlib is not installed"):
        command.inspect(Request(checkpoint=trained.path, out=tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()
