"""layout.json of whole runs: groups, slices and bytes of every rank."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rank_pool import RankPool
from test_train import paths, toy, train, until

__all__ = ["paths"]


def test_layout_json_shows_disjoint_slices_that_cover_the_table(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = until(toy(paths, optimizer="row_adagrad", mp=6, mp_rows=2, mp_hops=2), 1)
    train(pool, run, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "layout.json").read_text())
    covered = np.zeros((81, 24), dtype=int)
    for row in report["ranks"]:
        table = row["tables"]["memory.values"]
        covered[slice(*table["rows"]), slice(*table["columns"])] += 1
        height, width = table["rows"][1] - table["rows"][0], table["columns"][1] - table["columns"][0]
        assert table["bytes"] == height * width * 8
        assert table["bytes"] == pytest.approx(81 * 24 * 8 / 6, rel=0.02)
        # A number for each row and tile of 8 columns.
        assert table["state_bytes"] == {"accumulator": table["bytes"] // 8}
        rank = row["rank"]
        assert row["history_bytes"] == {"memory": height * 4}
        assert row["groups"]["memory"] == [0, 1, 2, 3, 4, 5]
        assert row["groups"]["memory_inside"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert row["groups"]["memory_across"] == [rank % 2, rank % 2 + 2, rank % 2 + 4]
    assert (covered == 1).all()
    assert report["sizes"]["mp_hops"] == 2


@pytest.mark.parametrize(
    ("ranks", "layout"), [(4, {"mp": 4, "mp_rows": 2}), (4, {"pp": 2, "mp": 2, "mp_rows": 1}), (4, {"mp": 2, "tp": 2})]
)
def test_layout_json_accounts_for_every_byte_of_all_tables(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path, ranks: int, layout: dict[str, int]
) -> None:
    run = until(toy(paths, dtype="float32", **layout), 1)
    # Blocks 1 and 3 lie on both of two stages, block 2 on the second.
    first = dataclasses.replace(run.memory, layers=(1, 3))
    second = dataclasses.replace(run.memory, variant="peer", layers=(2,), num_subkeys=5, optimizer="row_adagrad")
    run = dataclasses.replace(run, memory=first, more_memories=(second,))
    train(pool, run, tmp_path / "run", ranks=ranks)
    held = json.loads((tmp_path / "run" / "layout.json").read_text())["ranks"]
    for memory, config in run.memories.items():
        copies = {len(row["groups"]["copies"][memory]) for row in held if f"{memory}.values" in row["tables"]}
        assert len(copies) == 1
        for table in config.table_names:
            covered, num_bytes, state_bytes = np.zeros((config.num_slots, 24), dtype=int), 0, 0
            for part in (row["tables"][f"{memory}.{table}"] for row in held if f"{memory}.{table}" in row["tables"]):
                covered[slice(*part["rows"]), slice(*part["columns"])] += 1
                num_bytes, state_bytes = num_bytes + part["bytes"], state_bytes + sum(part["state_bytes"].values())
            assert {*covered.flat} == copies
            assert num_bytes == covered.sum() * 4
            # Two moments, or a number for each row and tile of 8 columns.
            assert state_bytes == (num_bytes // 8 if config.optimizer == "row_adagrad" else 2 * num_bytes)
