"""`simulate_plan`: what is refused, what it returns as JSON and as a table, and the trace that it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import mempar, refusal
from mempar.errors import ConfigError
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS
from mempar.runtime.slot_file import save_slots
from mempar.tools.profile import trace
from mempar.tools.simulate.command import simulate_plan
from mempar.tools.simulate.result import Simulation
from mempar.tools.simulate.table import simulation_table
from toy import VOCAB, toy_run
from trace_check import check_times, problems

H200 = GPUS["h200"]


def layout_of(num_ranks: int = 8, **toy: Any) -> Layout:
    return Layout.of(toy_run(**{"pp": 2, "mp": 4, "mp_rows": 2, "global_batch_size": 32, **toy}), num_ranks, VOCAB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zipf": -0.5}, "--zipf -0.5 must be a number from 0 to 10"),
        ({"zipf": float("nan")}, "--zipf nan must be"),
        ({"jitter": 1.5}, "--jitter 1.5 must be a number from 0 to 1"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"zipf": 1.1, "replay": Path("slots")}, "exclude each other"),
        ({"replay": Path("nowhere")}, "holds no recorded slots"),
        ({"trace": Path("/nowhere/trace.json")}, "cannot be written"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        simulate_plan(layout_of(), H200, **settings)


def test_skew_without_memory_layers_is_refused():
    with pytest.raises(ConfigError, match="without memory layers"):
        simulate_plan(layout_of(kind="dense", mp=1, mp_rows=1), H200, zipf=1.1)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Simulation, Path]:
    path = tmp_path_factory.mktemp("simulated") / "trace.json"
    return simulate_plan(layout_of(), H200, zipf=1.2, jitter=0.05, trace=path), path


def test_shares_add_up_and_json_holds_all(skewed: tuple[Simulation, Path]):
    simulation, _ = skewed
    for stage in simulation.stages:
        assert stage.compute + stage.exposed + stage.waiting + stage.bubble == pytest.approx(1)
        assert 0 <= stage.inside_utilisation < 1 and stage.across_utilisation == 0 and stage.entries_max_over_mean > 1
    for rank in range(8):
        spent = sum(simulation.ranks[kind][rank] for kind in ("compute", "exposed", "waiting", "bubble"))
        assert spent == pytest.approx(simulation.step_seconds)
    assert sum(seconds for _, _, seconds in simulation.path) == pytest.approx(simulation.step_seconds)
    found = json.loads(json.dumps(simulation.as_dict()))
    assert found["step_seconds"] == simulation.step_seconds > found["planned_seconds"] > 0
    assert found["layout"]["mp"] == 4 and found["layout"]["micro_batches"] == 4 and found["num_ranks"] == 8
    assert found["settings"] == {"zipf": 1.2, "replay": "", "jitter": 0.05, "seed": 1}
    phases = {phase["phase"]: phase for phase in found["phases"]}
    for name in ("query", "topk", "route", "split_sizes", "entries", "gather", "values", "gate", "reduce_rows"):
        assert phases[name]["compute"] + phases[name]["exposed"] > 0
    for name in ("gate_backward", "output_grads", "gather_backward", "score_grads", "topk_backward", "query_backward"):
        assert phases[name]["compute"] + phases[name]["exposed"] > 0
    assert phases["send/pp"]["bubble"] > 0 and phases["split_sizes"]["waiting"] > 0


def test_table_says_what_matters(skewed: tuple[Simulation, Path]):
    text = simulation_table(skewed[0])
    assert "skewed with exponent 1.2" in text and "jitters by 5.0%" in text
    assert "closed form" in text and "critical path" in text
    assert "send/pp" in text
    even = simulation_table(simulate_plan(layout_of(), H200))
    assert "even reads, equal ranks" in even


def test_replay_is_named_and_used(tmp_path: Path):
    layout = layout_of()
    memory, rng = layout.run.memory, np.random.default_rng(2)
    shape = (layout.run.train.seq_length, memory.heads, memory.top_k)
    first_rows = {
        (0, block, sample): rng.integers(0, memory.num_slots // 2, shape, dtype=np.int32)
        for block in memory.layers
        for sample in range(32)
    }
    save_slots(tmp_path / "one_sided.npz", first_rows)
    simulation = simulate_plan(layout, H200, replay=tmp_path)
    # All reads fall on the first of two row shards.
    assert simulation.stages[0].entries_max_over_mean == pytest.approx(2)
    assert str(tmp_path) in simulation_table(simulation)


def test_trace_is_one_of_a_profile(skewed: tuple[Simulation, Path]):
    simulation, path = skewed
    found = json.loads(path.read_text())
    schema = json.loads((Path(trace.__file__).parent / "trace.schema.json").read_text())
    assert problems(found, schema) == []
    check_times(found)
    slices = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in slices} == {0, 4}
    for rank in (0, 4):
        mine = [event for event in slices if event["pid"] == rank]
        assert max(event["ts"] + event["dur"] for event in mine) <= simulation.step_seconds * 1e6 + 1e-3
        assert {event["args"]["micro_batch"] for event in mine} == {-1, 0, 1, 2, 3}
    arrows = [event for event in found["traceEvents"] if event["ph"] == "s"]
    # Query, top-K, gather, gate, values and entries of three layers and four micro-batches.
    assert len(arrows) == 6 * 3 * 4


PLAN = ("plan", "134m_memory_plus_1m_8xh100_bf16", "--gpus", "8", "--hardware", "h200")


def test_plan_simulates_its_first_layout(tmp_path: Path):
    trace_file = tmp_path / "trace.json"
    skew = ("--zipf", "1.1", "--jitter", "0.05", "--trace", str(trace_file))
    status, out, _ = mempar(*PLAN, "--top", "1", "--simulate", *skew, "--json")
    assert status == 0
    found = json.loads(out)
    first, simulation = found["plans"][0], found["simulation"]
    assert simulation["planned_seconds"] == pytest.approx(first["step_seconds"])
    assert simulation["settings"]["zipf"] == 1.1 and simulation["settings"]["jitter"] == 0.05
    assert simulation["layout"]["mp_rows"] == first["mp_rows"] and len(simulation["ranks"]["compute"]) == 8
    assert trace_file.exists()
    status, out, _ = mempar(*PLAN, "--top", "1", "--simulate")
    assert status == 0 and "simulated step of" in out and "even reads, equal ranks" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--zipf", "1.1"], "--zipf without --simulate"),
        (["--simulate", "--zipf", "-1"], "must be a number from 0 to 10"),
        (["--simulate", "--replay", "nowhere"], "holds no recorded slots"),
    ],
)
def test_bad_options_end_in_one_message(options: list[str], message: str):
    assert message in refusal(*PLAN, *options)


def test_simulator_imports_no_torch():
    code = "import sys, mempar.tools.simulate.command, mempar.tools.simulate.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
