"""`mempar convert` as a command: what it refuses, what it leaves behind, and that it goes on where it was stopped."""

import contextlib
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from full_disk import full_disk
from made_up import MadeUp, make_checkpoint
from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.checkpoint.boxes import whole_box
from mempar.runtime.checkpoint.manifest import Manifest, read_manifest
from mempar.tools.convert import journal, megatron_common, plan, selection, source
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.command import convert, parse_size
from mempar.tools.convert.conversion import ConversionError
from mempar.tools.verify import differences, examine
from test_convert_layouts import OPTIONS, converted

__all__ = ["journal", "megatron_common", "plan", "selection", "source"]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEMPAR = Path(sys.executable).with_name("mempar")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 8 column shards in many row blocks, with its optimizer's state."""
    path = tmp_path_factory.mktemp("made-up") / "saved"
    make_checkpoint(path, MadeUp(num_subkeys=40, value_dim=64, state=True, block_bytes=1 << 14), "mp=8 mp_rows=1")
    return path


def command(*arguments: Any) -> list[str]:
    return [str(MEMPAR), "convert", *map(str, arguments)]


def run_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def is_same(one: Path, other: Path) -> bool:
    found = read_manifest(other)
    return differences(read_manifest(one), found) == [] and examine(found, lambda count: None).damages == []


def test_a_dry_run_shows_the_plan_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    said: list[str] = []
    convert(saved, tmp_path / "there", ["mp=4", "mp_rows=4"], **(OPTIONS | {"dry_run": True, "say": said.append}))
    (shown,) = said
    for word in ("reads", "writes", "memory", "disk", "time", "4 rank(s)"):
        assert word in shown
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_and_leaves_nothing_else(saved: Path, tmp_path: Path) -> None:
    done = run_command(saved, tmp_path / "there", "mp=4", "mp_rows=4")
    assert done.returncode == 0 and done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert is_same(saved, tmp_path / "there")


def test_conversion_imports_neither_megatron_nor_triton() -> None:
    code = "import sys, mempar.tools.convert.command; print([m for m in sys.modules if m in ('megatron', 'triton')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpp=2"], "tpp=2 is no size of a layout.*did you mean tp, "),
        (["mp"], "given as KEY=VALUE"),
        (["mp=2", "mp=4"], "mp is given twice"),
        (["mp=x"], "parallel.mp"),
        (["mp=5", "mp_rows=2"], "mp_rows=2 does not divide"),
        (["mp=16", "mp_rows=1"], "16 column shards need as many column tiles"),
        (["pp=3"], "not a multiple of parallel.pp"),
        (["dp=0"], "dp=0 is no number of replicas"),
        (["--to", "onnx"], "--to onnx is not known"),
        (["--dtype", "bf16"], "--dtype bf16 without --weights-only"),
        (["--dtype", "int8", "--weights-only"], "--dtype int8 is not known"),
        (["--max-memory", "lots"], "'lots' is no amount of memory"),
        (["--max-memory", "10KiB"], "--max-memory 10.0 KiB is too little.*raise it"),
        (["--workers", "0"], "--workers 0 does nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_message(arguments: list[str], message: str, saved: Path, tmp_path: Path) -> None:
    options = dict(OPTIONS)
    names = {"--to": "form", "--dtype": "dtype", "--max-memory": "max_memory", "--workers": "workers"}
    layout, left = [], list(arguments)
    while left:
        word = left.pop(0)
        if word == "--weights-only":
            options["weights_only"] = True
        elif word in names:
            value = left.pop(0)
            options[names[word]] = int(value) if word == "--workers" else value
        else:
            layout.append(word)
    with pytest.raises(ConfigError, match=message):
        convert(saved, tmp_path / "there", layout, **options)
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_size(text) for text in ("4GiB", "1.5 MB", "700", "2KiB")] == [4 << 30, 1_500_000, 700, 2048]


def test_destinations_that_exist_and_places_that_cannot_be_written_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for place in ("there", "file"):
        for resume in (False, True):
            with pytest.raises(ConfigError, match="exists; a conversion makes a new directory"):
                converted(saved, tmp_path / place, "", resume=resume)
    place = tmp_path / "file" / "there"
    with pytest.raises(ConversionError, match=rf"{place} cannot be made: .*; see to the disk") as refused:
        converted(saved, place, "")
    assert refused.value.exit_status == 2
    with pytest.raises(ConfigError, match="/proc/there needs"):
        converted(saved, Path("/proc/there"), "")
    with pytest.raises(CheckpointError, match="/proc is nothing that can be converted"):
        converted(Path("/proc"), tmp_path / "new", "")
    assert sorted(tmp_path.rglob("*")) == before


def table_file(root: Path) -> Path:
    return sorted((root / "tables" / "memory.values.exp_avg").glob("*"))[2]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_source_is_named_and_nothing_is_lost(damage: str, saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", saved, copy], check=True)
    path = table_file(copy)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = bytearray(whole)
        flipped[-5] ^= 4
        path.write_bytes(flipped if damage == "flipped" else whole[:-5])
    with pytest.raises(CheckpointError, match=rf"{path} is damaged: [^\n]*$") as refused:
        converted(copy, tmp_path / "there", "mp=4 mp_rows=4")
    assert refused.value.exit_status == 2 and not (tmp_path / "there").exists()
    # With the file restored it goes on from where it stopped; sizes are looked at before anything is written.
    path.write_bytes(whole)
    assert (tmp_path / "there.journal").exists() == (damage == "flipped")
    converted(copy, tmp_path / "there", "mp=4 mp_rows=4", resume=damage == "flipped")
    assert is_same(saved, tmp_path / "there")


def test_a_full_disk_stops_a_conversion_that_can_be_continued(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mempar.tools.convert.conversion._free", lambda path: 1000)
        with pytest.raises(ConfigError, match=r"needs .* more and its disk has 1000 bytes left"):
            converted(saved, tmp_path / "there", "mp=2")
    assert not (tmp_path / "there.partial").exists()
    with full_disk(), pytest.raises(ConversionError, match=r"there cannot be made: .*; see to the disk.*--resume"):
        converted(saved, tmp_path / "there", "mp=2", resume=True)
    assert not (tmp_path / "there").exists()
    converted(saved, tmp_path / "there", "mp=2", resume=True)
    assert is_same(saved, tmp_path / "there")


def interrupted(
    saved: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, layout: str = "mp=4 mp_rows=4"
) -> None:
    """Begin a conversion on a disk that goes away in its middle."""
    calls: list[int] = []

    def write_sixty(file: int, data: Any, start: int) -> None:
        calls.append(start)
        if len(calls) > 60:
            raise OSError(5, "the disk went away")
        os.pwrite(file, data, start)

    with monkeypatch.context() as patch:
        patch.setattr("mempar.runtime.checkpoint.block_writer.write_at", write_sixty)
        with pytest.raises(ConversionError, match="the disk went away"):
            converted(saved, destination, layout)
    assert len(destination.with_name("there.journal").read_bytes().splitlines()) > 3


def test_what_was_begun_is_only_continued_as_it_was_begun(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "there"
    interrupted(saved, destination, monkeypatch)
    with pytest.raises(ConfigError, match=r"journal exists: a conversion to .* was begun and did not end"):
        converted(saved, destination, "mp=4 mp_rows=4")
    with pytest.raises(ConfigError, match="belongs to another conversion"):
        converted(saved, destination, "mp=2 mp_rows=2", resume=True)
    converted(saved, destination, "mp=4 mp_rows=4", resume=True)
    assert is_same(saved, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_was_begun_is_whole_or_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "there"
    interrupted(saved, destination, monkeypatch)
    # Somebody makes the destination in the meantime.
    destination.mkdir()
    with pytest.raises(ConfigError, match="there exists; a conversion makes a new directory"):
        converted(saved, destination, "mp=4 mp_rows=4", resume=True)
    assert list(destination.iterdir()) == []
    destination.rmdir()
    # Somebody removes what was done.
    subprocess.run(["rm", "-r", tmp_path / "there.partial"], check=True)
    with pytest.raises(ConfigError, match=r"there\.partial is gone"):
        converted(saved, destination, "mp=4 mp_rows=4", resume=True)


def test_a_conversion_that_was_killed_before_it_tidied_up_is_done(saved: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "close", lambda self, remove=False: os.close(self._file))
        converted(saved, tmp_path / "there", "mp=2")
    assert (tmp_path / "there.journal").exists()
    converted(saved, tmp_path / "there", "mp=2", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_files_of_others_are_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "there.partial").mkdir()
    (tmp_path / "there.partial" / "thesis").write_text("x")
    (tmp_path / "other.journal").write_text("a diary\nof mine\n")
    for name, message in (("there", r"there\.partial exists"), ("other", "is no journal of a conversion")):
        with pytest.raises(ConfigError, match=message):
            converted(saved, tmp_path / name, "mp=2", resume=True)
    assert (tmp_path / "there.partial" / "thesis").read_text() == "x"
    assert (tmp_path / "other.journal").read_text() == "a diary\nof mine\n"
    source = tmp_path / "mine.partial"
    subprocess.run(["cp", "-r", saved, source], check=True)
    for destination in (tmp_path / "mine", source / "inside", source / "tables" / "inside", tmp_path):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"or the other way round|exists"):
                converted(source, destination, "mp=2", resume=resume)
    assert is_same(saved, source)


def test_two_conversions_do_not_write_to_one_place(saved: Path, tmp_path: Path) -> None:
    held = journal.Journal(tmp_path / "there.journal", "x")
    try:
        with pytest.raises(ConfigError, match="another conversion to this place is under way"):
            converted(saved, tmp_path / "there", "mp=2", resume=True)
    finally:
        held.close(remove=True)


def test_a_journal_forgets_what_was_being_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = journal.Journal(path, "x")
    first.add("one", {"digest": 1})
    first.add("two", {"digest": 2})
    first.close()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        again = journal.Journal(path, "x")
        lines = whole[:end].count(b"\n")
        assert list(again.results) == ["one", "two"][: max(0, lines - 1)]
        again.close()
        again = journal.Journal(path, "x")
        again.add("three", 3)
        again.close()
        again = journal.Journal(path, "x")
        assert "three" in again.results
        again.close(remove=True)
    assert not path.exists()


def test_rows_are_streamed_in_any_steps(saved: Path) -> None:
    tensors = CheckpointSource(saved)
    record = tensors.tensors["memory.values"]
    whole = torch.empty(record.shape)
    tensors.read(whole_box("memory.values", record.dtype, record.shape), whole)
    cuts = tensors.cuts("memory.values")
    assert cuts[0] == 0 and cuts[-1] == record.shape[0] and len(cuts) == 26
    draw = random.Random(3)
    for first, last in ((0, 1600), (5, 700), (64, 128), (1599, 1600)):
        with tensors.stream("memory.values", first, last) as rows:
            while first < last:
                count = min(last - first, draw.randint(1, 150))
                part = torch.full((count, record.shape[1]), float("nan"))
                rows.read(part)
                assert torch.equal(part.view(torch.int32), whole[first : first + count].view(torch.int32))
                first += count


def test_names_that_nobody_knows_are_refused(saved: Path, tmp_path: Path) -> None:
    strange = MadeUp(num_subkeys=32, value_dim=16)
    strange.tensors["decoder.layers.1.mlp.lost.weight"] = strange.tensors["memory.values"]
    with pytest.raises(CheckpointError, match=r"lost\.weight is no tensor of a model that this version"):
        make_checkpoint(tmp_path / "strange", strange, "mp=2")
    strange.tensors["memory.values.lost"] = strange.tensors["decoder.final_layernorm.weight"]
    del strange.tensors["decoder.layers.1.mlp.lost.weight"]
    with pytest.raises(CheckpointError, match=r"memory.values.lost is \[16\], and the table \[1024, 16\]"):
        make_checkpoint(tmp_path / "strange", strange, "mp=2")
    del strange.tensors["memory.values.lost"]
    strange.tensors["decoder.layers.1.self_attention.linear_proj.weight"] = strange.tensors[
        "decoder.final_layernorm.weight"
    ]
    with pytest.raises(CheckpointError, match=r"linear_proj\.weight is \[16\], which cannot be cut for tp=1"):
        make_checkpoint(tmp_path / "strange", strange, "mp=2")
    assert list(tmp_path.iterdir()) == []


def has_open(pid: int, name: str) -> bool:
    """Whether a process has opened a file of this name."""
    with contextlib.suppress(OSError):
        return any(os.readlink(f"/proc/{pid}/fd/{file}").endswith(name) for file in os.listdir(f"/proc/{pid}/fd"))
    return False


def kill_and_resume(saved: Path, destination: Path, draw: random.Random, kills: int, longest: float) -> list[str]:
    """Kill a conversion at random moments, as often as it takes; returns what each kill left behind."""
    left = []
    arguments = command(saved, destination, "mp=4", "mp_rows=4", "pp=2", "--resume", "--workers", 2)
    for _ in range(kills):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        begun, wait_seconds = time.monotonic(), draw.uniform(0, longest)
        # Most of a short conversion is Python's start; moments of work count.
        while process.poll() is None and not has_open(process.pid, "there.journal"):
            time.sleep(0.002)
            assert time.monotonic() - begun < 60
        time.sleep(wait_seconds)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), said
        if destination.exists():
            assert is_same(saved, destination)
            left.append("whole")
            subprocess.run(["rm", "-rf", destination, destination.with_name("there.journal")], check=True)
            continue
        done = destination.with_name("there.journal")
        left.append(f"{len(done.read_bytes().splitlines()) - 1 if done.exists() else 0} jobs done")
    return left


def finish(saved: Path, destination: Path) -> Manifest:
    done = run_command(saved, destination, "mp=4", "mp_rows=4", "pp=2", "--resume", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert is_same(saved, destination)
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]
    return read_manifest(destination)


def test_a_killed_conversion_resumes_to_the_same_digests(saved: Path, tmp_path: Path) -> None:
    kill_and_resume(saved, tmp_path / "there", random.Random(7), 2, 0.1)
    finish(saved, tmp_path / "there")


@pytest.mark.soak
def test_conversions_killed_at_fifty_moments_resume_to_the_same_digests(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    make_checkpoint(saved, MadeUp(num_subkeys=512, value_dim=512, state=True, block_bytes=1 << 22), "mp=8 mp_rows=1")
    (tmp_path / "made").mkdir()
    seed = random.SystemRandom().randrange(1 << 30)
    left = kill_and_resume(saved, tmp_path / "made" / "there", random.Random(seed), 50, 0.7)
    finish(saved, tmp_path / "made" / "there")
    today = datetime.date.today().isoformat()
    found = {
        "date": today,
        "seed": seed,
        "kills": len(left),
        "left": left,
        "unfinished": len(left) - left.count("whole"),
    }
    # Most of them while it was at work.
    at_work = [said for said in left if said not in ("whole", "0 jobs done")]
    assert len(at_work) > len(left) / 2, left
    (RESULTS / f"convert-kill-soak-{today}.json").write_text(json.dumps(found, indent=1) + "\n")
