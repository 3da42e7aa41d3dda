"""`mempar plan --measure`: figures of the machine at hand, as a file that plans are made for."""

import dataclasses
import datetime
from pathlib import Path

import pytest
import torch

from command_line import mempar, refusal, said_as
from mempar.errors import MemparError
from mempar.parallel.links import Link
from mempar.recipes import find_recipe
from mempar.runtime.hardware import GPUS
from mempar.runtime.hardware_file import load_hardware
from mempar.tools.plan import device_rates, measure
from mempar.tools.plan.planner import plan_run

LINK = Link(latency_us=50.0, gb_per_s=2.0)
RATES = device_rates.DeviceRates(
    bf16_tflops=600.0, float32_tflops=40.0, model_tflops=550.0, attention_tflops=300.0, memory_gb_per_s=4000.0,
    row_gb_per_s=3000.0, row_overhead_bytes=48, kernel_us=1.5,
)  # fmt: skip


def test_this_machine_is_measured_and_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Real figures of a core; the link, which takes two processes, is another test's."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "measure_link", lambda: LINK)
    path = tmp_path / "here.yaml"
    said = mempar("plan", "--measure", "--out", str(path))
    assert said.status == 0 and f"--hardware {path}" in said.out
    assert torch.get_num_threads() == threads
    here = load_hardware(path)
    assert here.gpu == "" and here.label.startswith("CPU, ")
    assert datetime.date.today().isoformat() in here.shares_source and "network" in here.assumed
    # A core does between a hundredth of a GFLOP/s, in the busiest hour, and ten TFLOP/s.
    assert 1e-5 < here.float32_tflops < 10 and 0.01 < here.memory_gb_per_s < 1000
    assert here.topology.inside == LINK and here.topology.across == LINK
    found = plan_run(find_recipe("smoke"), 2, here, top=1)
    assert (
        found.found.plans[0].time.seconds
        > plan_run(find_recipe("smoke"), 2, GPUS["h100"], top=1).found.plans[0].time.seconds
    )
    # What is there stays as it is.
    before = path.read_text()
    assert "is there already" in refusal("plan", "--measure", "--out", str(path)) and path.read_text() == before


@pytest.mark.parametrize(
    ("name", "gpu", "known"),
    [
        ("NVIDIA H200", "h200", True),
        ("NVIDIA H100 NVL", "h100", True),
        ("Rubin X", "b200", False),
        ("NVIDIA GH200 480GB", "b200", False),
        ("NVIDIA H100-PCIe", "h100", True),
    ],
)
def test_shares_of_known_gpus_are_of_their_makers_peaks(
    monkeypatch: pytest.MonkeyPatch, name: str, gpu: str, known: bool
) -> None:
    properties = type("Properties", (), {"name": name, "total_memory": 150 << 30, "major": 10})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(device_rates, "measure_device", lambda _: RATES)
    monkeypatch.setattr(measure, "measure_link", lambda: Link(latency_us=5.0, gb_per_s=300.0))
    here = measure.measure(lambda _: None)
    assert (here.gpu, here.memory_bytes, here.gpus_per_node) == (gpu, 150 << 30, 4)
    peak = GPUS[gpu].bf16_tflops if known else 600.0
    assert here.bf16_tflops == peak and here.matmul_share == pytest.approx(550 / peak, abs=1e-4)
    assert here.topology.inside.gb_per_s == pytest.approx(300.0, rel=1e-3)
    assert here.row_overhead_bytes == 48 and here.kernel_us == 1.5
    if known:
        assert here.link_gb_per_s == GPUS[gpu].link_gb_per_s and "as data sheets have them" in here.assumed


def test_two_ranks_measure_their_link() -> None:
    """Over gloo between two processes; nothing stays behind."""
    link = measure.measure_link()
    assert 0 <= link.latency_us < 1e5 and 0.001 < link.gb_per_s < 1000


def test_ranks_that_fail_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WORKER", "mempar.tools.plan.no_such_rank")
    with pytest.raises(MemparError, match=r"could not measure their link .*no_such_rank.* `mempar doctor` says"):
        measure.measure_link()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoke", "--measure"], "--measure with the recipe smoke"),
        (["--measure", "--gpus", "8", "--simulate"], "--measure with --gpus --simulate"),
        (["--measure", "--json", "--top", "5"], "--measure with --top --json"),
        (["--measure", "--out", "x.json"], "--out x.json is no .yaml"),
        (["--measure", "--out", "none/x.yaml"], "--out none/x.yaml has no directory"),
        (["smoke", "--hardware", "h200", "--out", "x.yaml"], "--out without --measure"),
    ],
    ids=said_as,
)
def test_bad_input_gets_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal("plan", *arguments)
    assert not list(tmp_path.iterdir())


def test_one_gpu_has_no_link_to_measure() -> None:
    alone = measure._with_link(GPUS["h200"], None, known=True)
    assert dataclasses.replace(alone, assumed=GPUS["h200"].assumed) == GPUS["h200"]
    assert "one GPU has no link" in alone.assumed
