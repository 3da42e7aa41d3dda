"""Universal checkpoints: what DeepSpeed's loaders find in them, there and back bit for bit, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from full_disk import full_disk
from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.manifest import HISTORY, OPTIMIZER, WEIGHTS, TensorRecord, checksum
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.deepspeed import DeepSpeedSource, is_universal, plan_deepspeed
from mempar.tools.convert.deepspeed.description import CONFIG, DESCRIPTION
from mempar.tools.convert.deepspeed.places import cut_of, place_of, universal_info
from rank_pool import RankPool
from test_digest_law import small_blocks, train_and_save
from toy import toy_run
from universal_cases import CASES, MEMORY_BYTES, box_of, folder_in, make_universal, whole


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every case, and a universal one made of it, as NAME and NAME.universal."""
    root = tmp_path_factory.mktemp("universal")
    jobs = [
        pool.submit(ranks, train_and_save, small_blocks(toy_run(**settings)), root / name)
        for name, (ranks, settings) in CASES.items()
    ]
    for job in jobs:
        job.result()
    for name in CASES:
        make_universal(CheckpointSource(root / name), root / f"{name}.universal")
    return root


@pytest.fixture
def universal(saved: Path, tmp_path: Path) -> Path:
    """A copy of one that may be spoiled."""
    return Path(shutil.copytree(saved / "bf16.universal", tmp_path / "universal"))


def test_deepspeed_reads_weights_and_moments_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    wanted = [
        # Engines with float32 and with bf16 weights; the first takes a step as torch's AdamW would, and comes back.
        ("stage1", "plain"),
        ("stage2-bf16", "two-row_adagrad"),
        ("stage3-bf16", "bf16"),
        # What they load with, as ranks of tensor and expert parallelism would.
        ("whole", "bf16-without-master"),
        ("tp2", "distributed"),
        ("tp2", "two-row_adagrad"),
        ("tp2", "peer-adamw"),
        ("tp2-ep2", "moe"),
    ]
    arguments = [text for case, name in wanted for text in (case, str(saved / name), str(saved / f"{name}.universal"))]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("deepspeed_load.py")), *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert len(outcomes) == len(wanted)
    for case, (compared, differing) in outcomes.items():
        assert compared > 30 and differing == [], case


@pytest.mark.parametrize("name", CASES)
def test_what_goes_out_comes_back_bit_for_bit(name: str, saved: Path) -> None:
    before, after = CheckpointSource(saved / name), DeepSpeedSource(saved / f"{name}.universal")
    assert after.tensors == before.tensors and after.has_digests
    assert (after.run, after.progress, after.about) == (before.run, before.progress, before.about)
    kinds = {record.kind for record in after.tensors.values()}
    assert kinds == {WEIGHTS, OPTIMIZER, HISTORY}
    for tensor in before.tensors:
        assert torch.equal(whole(before, tensor), whole(after, tensor)), tensor


def test_tensors_are_read_in_any_part(saved: Path) -> None:
    before, after = CheckpointSource(saved / "moe"), DeepSpeedSource(saved / "moe.universal")
    experts = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    for name in ("memory.values", experts, "memory.last_read", "decoder.final_layernorm.weight"):
        shape = before.tensors[name].shape
        expected = whole(before, name)
        part = tuple(slice(size // 3, max(size // 3 + 1, size - 1)) for size in shape)
        sizes = tuple(place.stop - place.start for place in part)
        found = torch.empty(sizes, dtype=expected.dtype)
        after.read(box_of(after, name, tuple(place.start for place in part), sizes), found)
        assert torch.equal(found, expected[part]), name
        cuts = after.cuts(name)
        assert cuts[0] == 0 and cuts[-1] == shape[0] and len(cuts) > (2 if name == "memory.values" else 1)
        for step in (1, 5, shape[0]):
            with after.stream(name, 2, shape[0] - 1) as rows:
                for start in range(2, shape[0] - 1, step):
                    found = torch.empty_like(expected[start : min(start + step, shape[0] - 1)])
                    rows.read(found)
                    assert torch.equal(found, expected[start : start + len(found)]), (name, step)


def test_a_job_done_again_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    source = CheckpointSource(saved / "plain")
    plan = plan_deepspeed(source, memory_bytes=MEMORY_BYTES)
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    plan.prepare(tmp_path)
    results = {}
    for number, job in enumerate(reversed(plan.jobs)):
        if number % 3 == 0:
            # Ended in the midst of it, and begun again.
            with pytest.raises(InterruptedError):
                job.run(tmp_path, interrupt)
            plan.prepare(tmp_path)
        results[job.key] = json.loads(json.dumps(job.run(tmp_path, lambda count: None)))
    # Nobody takes it for a whole one.
    with pytest.raises(CheckpointError):
        DeepSpeedSource(tmp_path)
    plan.finish(tmp_path, results)
    plan.prepare(tmp_path)
    plan.finish(tmp_path, results)
    expected = saved / "plain.universal"
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / path).read_bytes() == (expected / path).read_bytes(), path


def interrupt(count: int) -> None:
    raise InterruptedError


def test_tables_are_streamed_in_the_memory_that_is_given(saved: Path) -> None:
    source = CheckpointSource(saved / "plain")
    for memory_bytes in (1 << 12, 1 << 14, 1 << 30):
        jobs = plan_deepspeed(source, memory_bytes=memory_bytes).jobs
        own = max(job.memory_bytes - source.memory_bytes("memory.values") for job in jobs if "memory.values" in job.key)
        assert own <= memory_bytes // 2
    tables = [job for job in jobs if job.key.startswith("zero/memory.values/")]
    assert sum(job.bytes_written for job in tables) == 3 * 169 * 29 * 4 == sum(job.bytes_read for job in tables)


def test_weights_alone_have_no_step(saved: Path, tmp_path: Path) -> None:
    source = CheckpointSource(saved / "bf16-without-master")
    source.tensors = {name: record for name, record in source.tensors.items() if record.kind == WEIGHTS}
    source.progress = {"step": 0, "applied_steps": 0}
    make_universal(source, tmp_path)
    states = {path.name for path in (folder_in(tmp_path) / "zero").glob("*/*")}
    assert states == {"fp32.pt"}
    found = DeepSpeedSource(tmp_path)
    assert found.tensors == source.tensors and found.progress == source.progress
    assert torch.equal(whole(found, "memory.values"), whole(source, "memory.values"))


def continue_in_deepspeed(folder: Path, factor: float, step: Any) -> None:
    """Write parameters' files anew, as DeepSpeed's converter does after training."""
    for path in (folder / "zero").glob("*/*.pt"):
        if path.stem == "step":
            torch.save(step, path)
        else:
            content = torch.load(path, weights_only=True)
            torch.save({**content, "param": content["param"] * factor}, path)


@pytest.mark.parametrize("step", [7, torch.tensor(7.0)], ids=["number", "tensor"])
def test_what_deepspeed_trained_comes_back(step: Any, saved: Path, universal: Path) -> None:
    folder = folder_in(universal)
    continue_in_deepspeed(folder, 1.125, step)
    (folder / "mp_rank_00_model_states.pt").unlink()
    before, after = CheckpointSource(saved / "bf16"), DeepSpeedSource(universal)
    # The steps that the run went on, from 2 to 7.
    assert (after.progress["step"], after.progress["applied_steps"]) == (7, 7)
    assert not after.has_digests and after.identity != DeepSpeedSource(saved / "bf16.universal").identity
    values, master = whole(after, "memory.values"), whole(after, "memory.values.master")
    assert torch.equal(master, whole(before, "memory.values.master") * 1.125)
    assert values.dtype == torch.bfloat16 and torch.equal(values, master.bfloat16())
    assert torch.equal(whole(after, "memory.last_read"), whole(before, "memory.last_read"))


def test_parameters_of_different_steps_are_refused(universal: Path) -> None:
    path = folder_in(universal) / "zero" / "memory.values" / "step.pt"
    torch.save(3, path)
    with pytest.raises(CheckpointError, match=r"says 2 updates and .*memory\.values/step\.pt 3; .*updated alike"):
        DeepSpeedSource(universal)
    for value in ("three", -1, 2.5, True, torch.zeros(2), float("inf"), float("nan"), torch.tensor(1e300)):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match=r"step\.pt is damaged: it holds no number of updates"):
            DeepSpeedSource(universal)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def read_all(root: Path) -> None:
    source = DeepSpeedSource(root)
    for name in source.tensors:
        whole(source, name)


@pytest.mark.parametrize("rewritten", [False, True])
def test_damage_is_found_before_a_number_is_used(rewritten: bool, universal: Path) -> None:
    folder = folder_in(universal)
    if rewritten:
        continue_in_deepspeed(folder, 1.5, 2)
    read_all(universal)
    paths = [folder / "zero/memory.values/exp_avg.pt", folder / "mempar/memory.last_read.pt"]
    for path in paths[: 1 if rewritten else 2]:
        data = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            start = next(info.header_offset for info in archive.infolist() if info.filename.endswith("/data/0"))
        for place in (start + 300, len(data) // 2, start + 301):
            flip(path, place)
            with pytest.raises(CheckpointError, match=f"{path.name} is damaged: .*checksum"):
                read_all(universal)
            path.write_bytes(data)
        path.write_bytes(data[:-100])
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
            DeepSpeedSource(universal)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: it cannot be read \(No such file"):
            DeepSpeedSource(universal)
        path.write_bytes(data)
    read_all(universal)


def test_ones_that_do_not_say_what_they_are_are_refused(universal: Path) -> None:
    shutil.rmtree(folder_in(universal) / "mempar")
    assert is_universal(universal) and is_universal(folder_in(universal)) and not is_universal(universal.parent)
    with pytest.raises(CheckpointError, match=r"holds no mempar/description\.json: .*; copy the folder mempar from"):
        DeepSpeedSource(universal)


def spoil_description(folder: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool) -> None:
    """Change the text, with the checksum that belongs to it or without."""
    path = folder / DESCRIPTION
    text = json.loads(path.read_text())
    change(text["description"])
    if sealed:
        text["checksum"] = checksum(json.dumps(text["description"], sort_keys=True).encode())
    path.write_text(json.dumps(text))


def test_descriptions_that_lead_astray_are_refused(saved: Path, universal: Path) -> None:
    folder = folder_in(universal)
    kept = (folder / DESCRIPTION).read_bytes()
    entry = ["float32", [2], "weights", "0"]
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "path": lambda body: body["tensors"].update({"../../outside": entry}),
        "dots": lambda body: body["tensors"].update({"..": entry}),
        "missing": lambda body: body["tensors"].update({"decoder.other.weight": entry}),
        "size": lambda body: body["tensors"].update({"memory.values": ["bfloat16", [1 << 50, 24], "weights", "0"]}),
        "negative": lambda body: body["tensors"].update({"memory.values": ["bfloat16", [-1, 24], "weights", "0"]}),
        "kind": lambda body: body["tensors"].update({"memory.values": ["bfloat16", [144, 24], "other", "0"]}),
        "dtype": lambda body: body["tensors"].update({"memory.last_read": ["object", [144], "history", "0"]}),
        "blocks": lambda body: body["blocks"].update({"zero/memory.values/fp32.pt": [[0, 9, 3], [1, 2]]}),
        "progress": lambda body: body["progress"].update(step=-1),
        "nothing": lambda body: body.clear(),
    }
    for name, change in changes.items():
        spoil_description(folder, change, sealed=True)
        with pytest.raises(CheckpointError, match=r".+; .+"):
            DeepSpeedSource(universal)
        (folder / DESCRIPTION).write_bytes(kept)
        spoil_description(folder, change, sealed=False)
        with pytest.raises(CheckpointError, match="its checksum is not that of its text"):
            DeepSpeedSource(universal)
        (folder / DESCRIPTION).write_bytes(kept)
        assert name
    for text in ("", "{}", "[]", '{"format": 2}', "[" * 100_000):
        (folder / DESCRIPTION).write_text(text)
        with pytest.raises(CheckpointError, match=r"description\.json "):
            DeepSpeedSource(universal)
    (folder / DESCRIPTION).write_bytes(kept)
    (folder / CONFIG).write_text((folder / CONFIG).read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        DeepSpeedSource(universal)


def test_links_and_names_that_lead_outside_are_refused(saved: Path, universal: Path) -> None:
    for name in ("..", ".", "", "a/b", "/etc", "../universal", "x" * 300, "a\nb"):
        (universal / "latest_universal").write_text(name)
        with pytest.raises(CheckpointError, match="does not name a folder beside it"):
            DeepSpeedSource(universal)
    (universal / "latest_universal").unlink()
    # The folder itself will do too.
    (folder,) = universal.iterdir()
    assert DeepSpeedSource(folder).has_digests
    inner = folder / "zero" / "memory.values"
    inner.rename(folder / "elsewhere")
    inner.symlink_to(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="a directory on its way is a symbolic link"):
        DeepSpeedSource(folder)


def test_a_full_disk_ends_it_with_an_error(saved: Path, tmp_path: Path) -> None:
    plan = plan_deepspeed(CheckpointSource(saved / "plain"), memory_bytes=MEMORY_BYTES)
    with full_disk(), pytest.raises(OSError):
        plan.prepare(tmp_path)
    plan.prepare(tmp_path)
    with full_disk(), pytest.raises(OSError):
        plan.jobs[0].run(tmp_path, lambda count: None)


class Changed(CheckpointSource):
    """A checkpoint one number of which reads as another."""

    name = ""

    def read(self, box: Any, target: torch.Tensor) -> None:
        super().read(box, target)
        if box.name == self.name:
            target.view(-1)[0] += 1.0


def test_weights_that_are_not_their_copies_rounded_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in ("memory.values", "decoder.final_layernorm.weight"):
        source = Changed(saved / "bf16")
        source.name = name
        with pytest.raises(
            CheckpointError, match=f"{name} in .* is not .* rounded to torch.bfloat16; .*--weights-only"
        ):
            make_universal(source, tmp_path / name)


def test_tensors_without_a_place_are_refused(saved: Path) -> None:
    tensors = dict(CheckpointSource(saved / "plain").tensors)
    record = tensors["memory.values"]
    cases = {
        "memory.values": (replace(record, dtype="float64"), "would round it; .*--dtype float32"),
        "optimizer.state.momentum_buffer.output_layer.weight": (replace(record, kind=OPTIMIZER), "they hold Adam's"),
        "optimizer.state.exp_avg.other.weight": (replace(record, kind=OPTIMIZER), "which is not there"),
        "memory.values.exp_avg": (replace(record, kind=OPTIMIZER, shape=(3,)), "have its shape"),
        "a name": (record, "words joined by dots"),
    }
    for name, (changed, message) in cases.items():
        with pytest.raises(CheckpointError, match=message):
            place_of(name, {**tensors, name: changed})


def test_patterns_say_the_same_as_the_files(saved: Path) -> None:
    # DeepSpeed's own converter takes the first pattern that matches, and wants all of them used.
    source = CheckpointSource(saved / "moe")
    shapes = {name: record.shape for name, record in source.tensors.items() if record.kind == WEIGHTS}
    info = universal_info(shapes)
    for name, shape in shapes.items():
        cut = cut_of(name, shape)

        def matched(kind: str, name: str = name) -> bool:
            return sum(bool(re.match(pattern, name)) for pattern in info[kind]) == 1

        assert matched("tp_replicated_parameter_patterns") == ("cat_dim" not in cut)
        assert matched("vocabulary_parameter_patterns") == ("vocab_tensor" in cut)
        if "is_expert_param" not in cut:
            assert matched("parameter_with_row_parallelism_patterns") == (cut.get("cat_dim") == 1)
            assert matched("parameter_with_2_sub_params_cat_dim_0") == ("param_n_sub_params" in cut)
    assert info["original_vocab_size"] == shapes["embedding.word_embeddings.weight"][0]


def test_records_of_other_kinds_have_a_place_of_their_own() -> None:
    tensors = {
        "memory.values": TensorRecord(dtype="bfloat16", shape=(9, 4), kind=WEIGHTS, digest=0),
        "memory.values.accumulator": TensorRecord(dtype="float32", shape=(9, 2), kind=OPTIMIZER, digest=0),
        "memory.values.master": TensorRecord(dtype="float32", shape=(9, 4), kind=OPTIMIZER, digest=0),
        "memory.last_read": TensorRecord(dtype="int32", shape=(9,), kind=HISTORY, digest=0),
    }
    paths = {name: place_of(name, tensors).path for name in tensors}
    assert paths == {
        "memory.values": "zero/memory.values/fp32.pt",
        "memory.values.accumulator": "mempar/memory.values.accumulator.pt",
        "memory.values.master": "zero/memory.values/fp32.pt",
        "memory.last_read": "mempar/memory.last_read.pt",
    }
