"""`mempar plan` as its users meet it: tables, arithmetic, JSON, bad input; and plans that train."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import mempar, refusal, said_as
from mempar.recipes import find_recipe
from mempar.runtime.hardware import GPUS
from mempar.runtime.hardware_file import hardware_yaml
from mempar.runtime.overrides import override
from mempar.runtime.placement import place, resolve
from mempar.tools.launch import command as launch_command
from mempar.tools.plan.balance import changes_of_balance
from mempar.tools.plan.planner import plan_run
from mempar.tools.plan.settings import settings_of
from rank_pool import RankPool
from toy import joined, train

EIGHT_B, LARGEST = "8b_memory_plus_16m_128xh100_bf16", "1.3b_memory_plus_64m_64xh200_bf16"


@pytest.fixture(autouse=True)
def _own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_json_has_plans_best_first_and_reasons() -> None:
    status, out, _ = mempar("plan", EIGHT_B, "--gpus", "128", "--hardware", "h200", "--top", "3", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["recipe"], found["gpus"], found["hardware"]) == (EIGHT_B, 128, "H200")
    plans = found["plans"]
    assert [plan["place"] for plan in plans] == [1, 2, 3] and found["changes"] == []
    assert [plan["step_seconds"] for plan in plans] == sorted(plan["step_seconds"] for plan in plans)
    for plan in plans:
        assert plan["tp"] * plan["pp"] * plan["cp"] * plan["dp"] == 128
        for key in ("vpp", "ep", "mp", "mp_rows", "mp_hops", "micro_batch_size"):
            assert plan[key] >= 1
        assert plan["recompute"] in ("none", "selective", "full") and plan["sequence_parallel"] in (True, False)
        assert sum(plan["step_parts"].values()) == pytest.approx(plan["step_seconds"])
        assert sum(plan["step_sorts"].values()) == pytest.approx(plan["step_seconds"])
        sizes = plan["bytes_per_gpu"]
        assert {"weights", "table_values", "table_state", "activations", "row_sums", "total"} <= set(sizes)
        assert sizes["total"] <= found["memory_bytes"]
        assert plan["memory_share"] == pytest.approx(sizes["total"] / found["memory_bytes"])
        assert 0.2 < plan["mfu"] < 0.75
        assert plan["days"] * 24 * 128 == pytest.approx(plan["gpu_hours"])
        assert plan["tokens_per_second_per_gpu"] * 128 * plan["step_seconds"] == pytest.approx(1024 * 8192)
        sent = {each["name"]: each for each in plan["communication"]}
        assert all(each["bytes_per_gpu"] > 0 and each["link"] in ("inside a node", "across nodes") for each in
                   sent.values())  # fmt: skip
        run = override(find_recipe(EIGHT_B), plan["settings"])
        assert (run.parallel.tp, run.parallel.mp_rows, run.num_gpus) == (plan["tp"], plan["mp_rows"], 128)
    assert found["rejected"] and all(each["layouts"] >= 1 and each["reason"] for each in found["rejected"])
    assert "needs" in found["rejected"][0]["reason"] and found["rejected"][0]["bytes_per_gpu"] > found["memory_bytes"]
    assert found["own_layout"]["tp"] == 4


def test_explanation_adds_up_and_says_what_others_lose() -> None:
    status, out, _ = mempar("plan", EIGHT_B, "--gpus", "128", "--hardware", "h200", "--explain", "--top", "3")
    assert status == 0
    terms = re.findall(r"^  (\S+) +([\d,.]+) ms ", out, re.MULTILINE)
    total = re.search(r"^  sum +([\d,.]+) ms", out, re.MULTILINE)
    assert total and len(terms) > 15
    numbers = [float(number.replace(",", "")) for _, number in terms]
    assert sum(numbers) == pytest.approx(float(total[1].replace(",", "")), rel=1e-3)
    assert {"mlp", "gather", "entries", "reduce_scatter/dp"} <= {name for name, _ in terms}
    for words in (
        "layout 2 (",
        "layout 3 (",
        "the recipe's own (tp4",
        "GPU-hours",
        "assumed: gather_share",
        "GB/s reached",
    ):
        assert words in out
    assert f"mempar launch {EIGHT_B} " in out and "hardware.gpu=h200" in out


@pytest.mark.parametrize("share", [0.9, 1.5])
def test_memory_of_a_description_is_planned_for_where_a_launch_grants_it(tmp_path: Path, share: float) -> None:
    """The lesser of the two, and said: a launch judges by the kind of GPU."""
    kind = GPUS["h200"].memory_bytes
    (tmp_path / "other.yaml").write_text(
        hardware_yaml(dataclasses.replace(GPUS["h200"], memory_bytes=int(share * kind)))
    )
    for hardware, memory in (("other.yaml", int(min(share, 1.0) * kind)), ("h200", kind)):
        _, out, _ = mempar("plan", "smoke", "--gpus", "2", "--hardware", hardware, "--json")
        found = json.loads(out)
        assert found["memory_bytes"] == memory
        assert bool(found["memory_note"]) == (hardware == "other.yaml")
        _, out, _ = mempar("plan", "smoke", "--gpus", "2", "--hardware", hardware)
        note = re.search(r"planned for ([\d.]+) GiB: .* `mempar launch` judges by the 140.4 of", out)
        assert (note and float(note[1])) == (round(memory / 2**30, 1) if found["memory_note"] else None)


@pytest.mark.parametrize(
    ("gpu", "gpus_per_node", "gpus", "started"),
    [("h200", 8, 16, ("slurm", 2, 8)), ("h200", 4, 4, ("local", 1, 4)), ("", 2, 4, ("slurm", 2, 2)),
     ("", 8, 4, ("local", 1, 4))],
)  # fmt: skip
def test_command_that_is_printed_starts_the_planned_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: str, gpus_per_node: int, gpus: int,
    started: tuple[str, int, int],
) -> None:  # fmt: skip
    """As a shell reads it, brackets, braces and spaces of values included; the same words in JSON."""
    nodes = dataclasses.replace(GPUS["h200"], gpu=gpu, gpus_per_node=gpus_per_node)
    (tmp_path / "nodes.yaml").write_text(hardware_yaml(nodes))
    given = ["smoke", "more_memories=[{layers: [0], num_subkeys: 16, top_k: 4}]"]
    arguments = ("plan", *given, "--gpus", str(gpus), "--hardware", "nodes.yaml", "--top", "1")
    status, out, _ = mempar(*arguments)
    assert status == 0
    words = shlex.split(out.splitlines()[-1].removeprefix("to run the first: "))
    _, out, _ = mempar(*arguments, "--json")
    assert words == ["mempar", "launch", *json.loads(out)["plans"][0]["launch"]] and words[2:4] == given
    asked: list[launch_command.Request] = []
    monkeypatch.setattr(launch_command, "launch", lambda request, say: asked.append(request))
    assert mempar(*words[1:])[0] == 0
    request = asked[0]
    assert (request.place, request.nodes, request.per_node) == started
    run = override(find_recipe(request.recipe), request.assignments)
    assert run.hardware.gpu == gpu and place(resolve(run, gpus), gpus).grid.world == gpus
    assert [memory.layers for memory in run.more_memories] == [(0,)]


def test_plans_that_balance_over_other_tokens_say_so() -> None:
    """Reads that a rank looks up at a time are those of the recipe's layout, or a change of training."""
    arguments = ("plan", "smoke", "memory.balance_loss=0.01", "train.micro_batch_size=4", "--gpus", "4",
                 "--hardware", "h200", "--top", "40")  # fmt: skip
    _, out, _ = mempar(*arguments, "--json")
    plans = json.loads(out)["plans"]
    tokens = [plan["micro_batch_size"] * 128 // (plan["tp"] * plan["cp"]) for plan in plans]
    words = "memory.balance_loss is taken over {:,} tokens at a time instead of 512"
    assert [plan["changes"] for plan in plans] == [[] if each == 512 else [words.format(each)] for each in tokens]
    assert len(set(tokens)) > 2
    _, out, _ = mempar(*arguments)
    assert "CHANGE THE TRAINING" in out.splitlines()[0]
    other = next(each for each in tokens if each != 512)
    places = ", ".join(str(place) for place, each in enumerate(tokens, 1) if each == other)
    assert f"  {places}: {words.format(other)}" in out.splitlines()


def test_experts_balance_over_whole_micro_batches() -> None:
    """Whatever the tensor-parallel size: megatron adds up the counts of its ranks."""
    given = find_recipe("1.3b_moe4_64xh100_bf16")
    size = given.train.micro_batch_size
    assert (
        given.moe.aux_loss and size and not changes_of_balance(given, given.with_parallel(tp=8, sequence_parallel=True))
    )
    twice = dataclasses.replace(given, train=dataclasses.replace(given.train, micro_batch_size=2 * size))
    before, after = (f"{factor * size * given.train.seq_length:,}" for factor in (1, 2))
    assert changes_of_balance(given, twice) == [
        f"moe.aux_loss is taken over {after} tokens at a time instead of {before}"
    ]
    calm = dataclasses.replace(twice, moe=dataclasses.replace(given.moe, aux_loss=0.0))
    assert not changes_of_balance(calm, calm)


def test_planning_imports_no_torch() -> None:
    """It answers in a second, and on machines that have none."""
    code = "import sys; from mempar.cli import main; sys.argv = ['mempar', *sys.argv[1:]]\n"
    code += "try: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    arguments = ["plan", "smoke", "--gpus", "2", "--hardware", "h200", "--explain"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "smoke on 2 H200" in done.stdout


def test_changes_of_training_are_said_before_anything_else() -> None:
    status, out, _ = mempar("plan", LARGEST, "--gpus", "8", "--hardware", "h200", "--top", "1")
    assert status == 0
    first = out.splitlines()[0]
    assert "CHANGE ITS TRAINING" in first and "would fit on 16" in first
    assert "memory.optimizer=row_adagrad instead of row_adam" in out
    assert "memory.optimizer=row_adagrad" in out.splitlines()[-1] and "train.steps=476840" in out.splitlines()[-1]


def test_what_fits_nowhere_ends_well_with_what_would_help() -> None:
    status, out, _ = mempar("plan", LARGEST, "--gpus", "1", "--hardware", "a100")
    assert status == 0 and out.startswith("nothing fits: ")
    assert "of these GPUs, with every setting as it is" in out and "memory.optimizer=row_adagrad" in out
    status, out, _ = mempar("plan", LARGEST, "--gpus", "1", "--hardware", "a100", "--json")
    found = json.loads(out)
    assert status == 0 and found["plans"] == [] and found["enough_gpus"] > 16 and found["advice"]


def test_where_nothing_fits_nothing_is_simulated_and_that_is_said(tmp_path: Path) -> None:
    arguments = ("plan", LARGEST, "--gpus", "1", "--hardware", "a100", "--simulate", "--trace", "trace.json")
    status, out, _ = mempar(*arguments)
    assert status == 0 and "simulated: nothing, and no trace is written: no layout fits" in out
    status, out, _ = mempar(*arguments, "--json")
    found = json.loads(out)
    assert status == 0 and found["simulation"] is None and "no layout fits" in found["simulation_reason"]
    assert not list(tmp_path.iterdir())


def test_hardware_may_be_a_file_and_overrides_are_the_runs_own(tmp_path: Path) -> None:
    slow = dataclasses.replace(GPUS["h200"], label="slow H200", network_gb_per_s=5.0)
    (tmp_path / "slow.yaml").write_text(hardware_yaml(slow))
    arguments = ["plan", LARGEST, "memory.optimizer=row_adagrad", "memory.moments_dtype=float32", "--json", "--top=1"]
    found = {}
    for hardware in ("h200", "slow.yaml"):
        status, out, _ = mempar(*arguments, "--hardware", hardware)
        assert status == 0
        found[hardware] = json.loads(out)
    assert found["slow.yaml"]["hardware"] == "slow H200" and found["slow.yaml"]["gpus"] == 64
    fast, late = (found[name]["plans"][0] for name in ("h200", "slow.yaml"))
    assert late["step_seconds"] > fast["step_seconds"] and late["changes"] == []
    assert not any(each.startswith("memory.") for each in late["settings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok", "--gpus", "8", "--hardware", "h200"], "did you mean smoke"),
        (["smoke", "--gpus", "8", "--hardware", "h20"], "did you mean h200"),
        (["smoke", "--gpus", "8", "--hardware", "none.yaml"], "none.yaml does not exist"),
        (["smoke", "--gpus", "8", "--hardware", "bad.yaml"], "bad.yaml cannot be read as YAML"),
        (["smoke", "--gpus", "8", "--hardware", "near.yaml"], "did you mean matmul_share"),
        (["smoke", "--gpus", "0", "--hardware", "h200"], "--gpus 0 plans for no GPU"),
        (["smoke", "--gpus", "8", "--hardware", "h200", "--top", "0"], "--top 0 asks for no plan"),
        (["smoke", "--gpus", "8"], "names no GPU, and --hardware is not there"),
        (["smoke", "train.stps=3", "--gpus", "8", "--hardware", "h200"], "did you mean train.steps"),
        (["smoke", "--gpus", "100003", "--hardware", "h200"], "allows no layout of smoke"),
        (["smoke", "--gpus", "12", "--hardware", "h200"], "--gpus 12 on nodes of 8"),
        (["smoke", "--gpus", "8", "--hardware", "h200", "--explain", "--json"], "--explain with --json"),
        ([], "no recipe is given"),
    ],
    ids=said_as,
)
def test_bad_input_gets_one_message_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.yaml").write_text("label: [\n")
    (tmp_path / "near.yaml").write_text("like: h200\nmatmul_shar: 1\n")
    assert message in refusal("plan", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "near.yaml"]


@pytest.mark.parametrize(("recipe", "ranks"), [(f"{EIGHT_B}_tiny", 4), (f"{LARGEST}_tiny", 4)])
def test_plans_of_tiny_twins_train(pool: RankPool, recipe: str, ranks: int) -> None:
    """The first plan's settings make a run that takes a step, finite and equal on all ranks."""
    cores = dataclasses.replace(GPUS["h200"], gpu="", label="CPU", gpus_per_node=ranks)
    found = plan_run(find_recipe(recipe), ranks, cores, top=1)
    run = override(find_recipe(recipe), settings_of(found.given, found.found.plans[0].layout.run))
    history = joined(run, pool.run(ranks, train, run, 1))
    assert history.reports[0].applied and np.isfinite(history.reports[0].loss)
    assert history.reports[0].memory_grad_norm > 0
