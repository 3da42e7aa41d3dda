"""Conversions between layouts that are drawn at random, for as long as it is let; `make soak`.

A run in one drawn layout trains and saves; its checkpoint goes through layouts of up to 48 ranks that nobody listed and
into one that a pool can run, and training goes on there: equal digests on the way, every rank's files as it would have
saved them, and the float64 layout law against the run that went on where it was.
"""

import datetime
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.config import RunConfig
from mempar.tools.convert.layout import in_layout
from mempar.tools.verify import differences, examine
from rank_pool import RankPool
from test_convert_layouts import check_files, converted, go_on
from test_digest_law import train_and_save
from test_layout_soak import MOST_RANKS, RESULTS, drawn_run, play_for_a_while


def drawn_layout(draw: random.Random, run: RunConfig, most_ranks: int) -> str:
    """Sizes that fit the model, all as likely as another."""
    while True:
        mp = draw.randint(1, 8)
        sizes = {
            "tp": draw.choice((1, 2)),
            "pp": draw.choice((1, 2, 4)),
            "vpp": draw.choice((1, 2)),
            "mp": mp,
            "mp_rows": draw.choice([rows for rows in range(1, mp + 1) if mp % rows == 0]),
            "mp_hops": draw.choice((1, 2)),
            "ep": draw.choice((1, 2)) if run.moe.enabled else 1,
            "dp": draw.randint(1, 12),
        }
        layout = " ".join(f"{key}={size}" for key, size in sizes.items())
        try:
            _, world = in_layout(run, layout.split())
        except ConfigError:
            continue
        if world <= most_ranks:
            return layout


def convert_and_go_on(pool: RankPool, root: Path, seed: int) -> dict[str, Any]:
    """One round; returns what was drawn, and the worst deviations of the run that went on."""
    world, run = drawn_run(seed)
    draw = random.Random(seed)
    run = replace(run, checkpoint=CheckpointConfig(block_bytes=draw.choice((300, 700, 5000))))
    pool.run(world, train_and_save, run, root / "0")
    first = read_manifest(root / "0")
    layouts = [drawn_layout(draw, run, MOST_RANKS if last else 48) for last in (False, False, True)]
    for number, layout in enumerate(layouts):
        found = converted(root / str(number), root / str(number + 1), layout)
        assert differences(first, found) == [], (seed, layout)
        assert examine(found, lambda count: None).damages == [], (seed, layout)
        check_files(found, found.about["layout"]["world"])
    there, ranks = in_layout(run, layouts[-1].split())
    whole, parts = pool.submit(world, go_on, run, root / "0"), pool.submit(ranks, go_on, there, root / "3")
    worst = {"loss": 0.0, "norms": 0.0}
    for of_rank in parts.result():
        for before, after in zip(whole.result()[0], of_rank, strict=True):
            apart = [abs(mine - other) / max(abs(other), 1e-30) for mine, other in zip(after, before, strict=True)]
            worst = {"loss": max(worst["loss"], apart[0]), "norms": max(worst["norms"], *apart[1:])}
    return {"seed": seed, "saved_in": world, "layouts": layouts, **worst}


@pytest.mark.soak
def test_conversions_through_layouts_drawn_at_random_keep_the_laws(pool: RankPool, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    def play(seed: int) -> None:
        root = tmp_path / "round"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        rows.append(convert_and_go_on(pool, root, seed))
        assert rows[-1]["loss"] <= 1e-9, rows[-1]
        assert rows[-1]["norms"] <= 1e-6, rows[-1]

    try:
        play_for_a_while(play)
    finally:
        today = datetime.date.today().isoformat()
        worst = {name: max((row[name] for row in rows), default=0.0) for name in ("loss", "norms")}
        found = {"date": today, "rounds": len(rows), "worst": worst, "drawn": rows}
        (RESULTS / f"convert-soak-{today}.json").write_text(json.dumps(found, indent=1) + "\n")
    assert rows
