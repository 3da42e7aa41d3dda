"""Recording in training: the first steps of each launch, held-out batches left out, and nothing else changes."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mempar.runtime.slot_file import UNKNOWN, load_slots, save_slots
from mempar.runtime.slot_recording import SlotRecorder
from rank_pool import RankPool
from test_train import paths, toy, train, until

__all__ = ["paths"]


def test_first_steps_of_each_launch_are_recorded(pool: RankPool, paths: tuple[str, ...], tmp_path: Path):
    run = until(toy(paths, mp=2, mp_rows=2), 4)
    traced = dataclasses.replace(run, train=dataclasses.replace(run.train, trace_steps=2))
    plain = train(pool, run, tmp_path / "plain", ranks=2)
    train(pool, until(traced, 3), tmp_path / "traced", ranks=2)
    rows = train(pool, traced, tmp_path / "traced", ranks=2, resume=True)
    for row, other in zip(plain, rows, strict=True):
        assert all(value == other[name] for name, value in row.items() if name not in ("seconds", "tokens_per_s"))
    assert not (tmp_path / "plain" / "slots").exists()
    folder = tmp_path / "traced" / "slots"
    files = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
    # Step 3 is the only one of the second launch.
    recorded = [(0, 0), (0, 1), (3, 3)]
    assert files == [f"from_{a:08d}/step_{step:08d}_rank_{rank:05d}.npz" for a, step in recorded for rank in (0, 1)]
    batch = run.train.global_batch_size
    for path, steps in ((tmp_path / "traced", (3,)), (folder / "from_00000000", (0, 1))):
        slots = load_slots(path)
        assert slots.keys() == {
            (step, block, sample)
            for step in steps
            for block in run.memory.layers
            for sample in range(step * batch, (step + 1) * batch)
        }
        for choices in slots.values():
            assert choices.shape == (run.train.seq_length, run.memory.heads, run.memory.top_k)
            assert choices.min() > UNKNOWN and choices.max() < run.memory.num_slots


def recorder(folder: Path, *, rank: int = 0, tp: int = 1, steps: int = 2) -> tuple[SlotRecorder, list[Any]]:
    """A recorder of one rank of a tensor-parallel group, and what its model was given to hook."""
    hooked: list[Any] = []
    stepper = SimpleNamespace(
        run=SimpleNamespace(
            parallel=SimpleNamespace(sequence_parallel=False, tp=tp), train=SimpleNamespace(trace_steps=steps)
        ),
        world=SimpleNamespace(
            rank=rank,
            is_main=rank == 0,
            device=None,
            placement=SimpleNamespace(grid=SimpleNamespace(tp_rank=lambda rank: rank % tp)),
        ),
    )
    made: Any = SlotRecorder(stepper, SimpleNamespace(access=[1], hook_slots=hooked.append), folder)  # type: ignore[arg-type]
    return made, hooked


def record(made: Any, step: int) -> None:
    with made.recording(step):
        if made._left:
            made._tracer.recorded.record((step, 1, 0), np.full((4, 1, 2), step, np.int32), 0, 4)


def test_launch_clears_what_was_recorded_from_its_step_on(tmp_path: Path):
    for first in (0, 3, 5):
        (tmp_path / f"from_{first:08d}").mkdir()
        save_slots(tmp_path / f"from_{first:08d}" / "step_00000000_rank_00007.npz", {(0, 0, 0): np.zeros((1, 1, 1))})
    (tmp_path / "from_me").mkdir()
    made, _ = recorder(tmp_path)
    for step in (3, 4, 5):
        record(made, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from_00000000", "from_00000003", "from_me"]
    assert {step for step, _, _ in load_slots(tmp_path)} == {3, 4}
    assert {step for step, _, _ in load_slots(tmp_path, first_step_only=True)} == {3}


def test_ranks_that_do_not_write_record_nothing(tmp_path: Path):
    made, hooked = recorder(tmp_path, rank=1, tp=2)
    record(made, 0)
    assert not hooked and not list(tmp_path.iterdir())


def test_disk_that_cannot_be_written_ends_recording_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "slots").write_text("no directory")
    made, hooked = recorder(tmp_path / "slots", steps=3)
    for step in range(3):
        record(made, step)
    assert len(hooked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank 0 records no more slots" in line and "training goes on" in line
