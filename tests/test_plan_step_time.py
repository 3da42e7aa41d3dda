"""The time of a step: closed forms of pipelines, a case by hand, and what no change may do."""

import dataclasses

import pytest

from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import exchange_bytes
from mempar.recipes import find_recipe
from mempar.runtime.config import ModelConfig, MoeConfig, RunConfig, TrainConfig
from mempar.runtime.estimate import estimate
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS, Hardware
from mempar.tools.plan.compute import block_compute_us, head_compute_us
from mempar.tools.plan.figures import figures_of
from mempar.tools.plan.search import Plan
from mempar.tools.plan.step_time import AGAIN, BUBBLE, StepTime, step_time
from mempar.tools.plan.traffic import ACROSS, INSIDE, traffic_of
from mempar.tools.simulate.step import Disturbance, Step

# Links that cost nothing, and an optimizer's memory that costs nothing: what remains of a step are its passes.
FREE_LINKS = dataclasses.replace(
    GPUS["h200"], link_gb_per_s=1e15, network_gb_per_s=1e15, link_latency_us=0.0, network_latency_us=0.0
)
ARITHMETIC = dataclasses.replace(FREE_LINKS, memory_gb_per_s=1e15, kernel_us=0.0)
DENSE = RunConfig(
    model=ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, vocab_size=128),
    train=TrainConfig(global_batch_size=32, micro_batch_size=1, seq_length=64),
)
MEMORY = dataclasses.replace(
    DENSE, memory=MemoryConfig(layers=(2, 6), num_subkeys=32, heads=2, top_k=4, key_dim=32, column_tile=8)
)


def predicted(run: RunConfig, num_ranks: int, hardware: Hardware) -> StepTime:
    return step_time(Layout.of(run, num_ranks, 128), hardware)


def block_us(run: RunConfig, hardware: Hardware) -> float:
    return sum(us.total for us in block_compute_us(run, Layout.of(run, 1, 128), 0, hardware).values())


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (4, 2), (2, 4)])
def test_pipeline_takes_what_the_closed_forms_say(pp: int, vpp: int) -> None:
    """Equal stages: m t + (p - 1) t / v; and the output layer, on the last stage, makes that one slower."""
    run = DENSE.with_parallel(pp=pp, vpp=vpp)
    found = predicted(run, pp, ARITHMETIC)
    block = block_us(DENSE, ARITHMETIC)
    head = head_compute_us(DENSE, Layout.of(DENSE, 1, 128), ARITHMETIC).total
    stage = 8 // pp * block
    assert found.stage_us[:-1] == pytest.approx((stage,) * (pp - 1))
    assert found.stage_us[-1] == pytest.approx(stage + head)
    assert found.parts[BUBBLE] == pytest.approx((pp - 1) * stage / vpp)
    assert found.seconds * 1e6 == pytest.approx(32 * (stage + head) + (pp - 1) * stage / vpp, rel=1e-6)


def test_a_step_by_hand() -> None:
    """Two ranks, tensor and data parallelism apart, at 1 TFLOP/s and 1 GB/s; memory and latency free."""
    hardware = dataclasses.replace(
        ARITHMETIC, float32_tflops=1.0, matmul_share=1.0, attention_share=1.0, link_gb_per_s=1.0, link_share=1.0
    )
    run = dataclasses.replace(DENSE, model=dataclasses.replace(DENSE.model, num_layers=1))
    # A token: 4 C^2 in attention's projections, 3 C F, C V of the output; a pair of positions 2 C, half of all.
    products = 2 * 64 * (4 * 64 * 64 + 3 * 64 * 256 + 64 * 128)
    core = 2 * 64 * 64 * 64
    compute = 32 * (3 * products + 3.5 * core) / 1e6
    split = predicted(run.with_parallel(tp=2), 2, hardware)
    # Two all-reduces of 64 x 64 float32 numbers a pass, one of the embedding's, one of the head's gradient, three
    # numbers a token in the loss: with two ranks each carries as many bytes as the tensor has.
    sent = 32 * (6 * 64 * 64 * 4 + 3 * 64 * 4) / 1e3
    assert split.parts["all_reduce/tp"] == pytest.approx(sent)
    assert split.seconds * 1e6 == pytest.approx(compute / 2 + sent, rel=1e-3)
    both = predicted(run, 2, hardware)
    parameters = 2 * 128 * 64 + 3 * 64 + 4 * 64 * 64 + 3 * 64 * 256
    assert both.parts["all_reduce/dp"] == pytest.approx(parameters * 4 / 1e3)
    assert both.seconds * 1e6 == pytest.approx(compute / 2 + parameters * 4 / 1e3, rel=1e-3)


def test_recomputation_adds_the_forward_pass_again() -> None:
    """Full recomputation makes three passes of two; the exchange of a memory layer runs again too."""
    run = MEMORY.with_parallel(mp=4, mp_rows=2)
    again = dataclasses.replace(run, train=dataclasses.replace(run.train, recompute="full"))
    plain, full = (predicted(each, 4, GPUS["h200"]) for each in (run, again))
    layout = Layout.of(run, 4, 128)
    blocks = [block_compute_us(run, layout, block, GPUS["h200"]) for block in range(8)]
    forward = sum(us.forward for block in blocks for us in block.values())
    assert full.parts[AGAIN] == pytest.approx(plain.num_micro_batches * forward)
    assert full.parts["entries"] == pytest.approx(2 * plain.parts["entries"])
    assert full.parts["values"] == pytest.approx(2 * plain.parts["values"])
    assert full.parts["output_grads"] == pytest.approx(plain.parts["output_grads"])


LAYOUTS = {
    "rows": ({"mp": 8, "mp_rows": 8}, 16),
    "grid in two hops": ({"mp": 16, "mp_rows": 8, "mp_hops": 2}, 16),
    "replicas": ({"mp": 2, "mp_rows": 1}, 8),
    "copies on stages": ({"pp": 4, "mp": 2, "mp_rows": 2}, 16),
    "virtual stages": ({"pp": 2, "vpp": 2, "mp": 4, "mp_rows": 2}, 16),
    "tensor parallel": ({"tp": 2, "mp": 4, "mp_rows": 4}, 8),
    "sequence parallel": ({"tp": 4, "sequence_parallel": True, "mp": 4, "distributed_optimizer": True}, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_faster_hardware_is_never_slower(layout: str) -> None:
    sizes, ranks = LAYOUTS[layout]
    run = MEMORY.with_parallel(**sizes)
    base = predicted(run, ranks, GPUS["h200"]).seconds
    for name in ("bf16_tflops", "float32_tflops", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s"):
        faster = dataclasses.replace(GPUS["h200"], **{name: 3 * getattr(GPUS["h200"], name)})
        assert predicted(run, ranks, faster).seconds <= base, name
    for name in ("link_latency_us", "network_latency_us", "kernel_us", "row_overhead_bytes"):
        faster = dataclasses.replace(GPUS["h200"], **{name: 0})
        assert predicted(run, ranks, faster).seconds <= base, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_cost_what_the_bound_leaves_out(layout: str) -> None:
    """Parts add up to the step, and the same layout without its tables is a bound for any cut of them."""
    sizes, ranks = LAYOUTS[layout]
    run = MEMORY.with_parallel(**sizes)
    found = predicted(run, ranks, GPUS["h200"])
    assert sum(found.by_sort.values()) == pytest.approx(found.seconds)
    assert sum(found.parts.values()) == pytest.approx(found.seconds * 1e6)
    whole = Layout.of(run.with_parallel(mp=1, mp_rows=1, mp_hops=1), ranks, 128)
    assert step_time(whole, GPUS["h200"], with_tables=False).seconds <= found.seconds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_has_every_part_that_is_sent(layout: str) -> None:
    sizes, ranks = LAYOUTS[layout]
    laid_out = Layout.of(MEMORY.with_parallel(**sizes), ranks, 128)
    found = step_time(laid_out, GPUS["h200"])
    sent = traffic_of(laid_out, GPUS["h200"], found)
    assert {each.name for each in sent} == set(found.communication)
    assert all(each.sent_bytes > 0 and each.seconds > 0 for each in sent)
    assert {each.link for each in sent} <= {INSIDE, ACROSS}


def test_traffic_of_an_exchange_is_that_of_the_bytes_law() -> None:
    run = MEMORY.with_parallel(mp=4, mp_rows=2)
    layout = Layout.of(run, 4, 128)
    sent = {each.name: each for each in traffic_of(layout, GPUS["h200"], step_time(layout, GPUS["h200"]))}
    plan = layout.placement.memories["memory"].plan
    law = exchange_bytes(plan, 0, [[256, 256]] * 4, [64] * 4, reads=8, value_bytes=4)
    for phase in ("split_sizes", "entries", "values", "output_grads", "score_grads"):
        assert sent[phase].sent_bytes == 2 * 8 * getattr(law, phase), phase
        assert sent[phase].link == INSIDE


def test_traffic_counts_merged_reads_once() -> None:
    """Two heads that choose 4 of 16 slots each: an eighth of the reads is another's."""
    memory = dataclasses.replace(MEMORY.memory, num_subkeys=4, merge_duplicates="on")
    layout = Layout.of(dataclasses.replace(MEMORY, memory=memory).with_parallel(mp=4, mp_rows=2), 4, 128)
    sent = {each.name: each for each in traffic_of(layout, GPUS["h200"], step_time(layout, GPUS["h200"]))}
    plan = layout.placement.memories["memory"].plan
    law = exchange_bytes(plan, 0, [[224, 224]] * 4, [64] * 4, reads=8, value_bytes=4, merged=True)
    for phase in ("entries", "values", "score_grads"):
        assert sent[phase].sent_bytes == 2 * 8 * getattr(law, phase), phase


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (4, 2)])
def test_ends_of_a_pipeline_send_one_message_less(pp: int, vpp: int) -> None:
    """No activation leaves the last chunk, no gradient the first one."""
    layout = Layout.of(DENSE.with_parallel(pp=pp, vpp=vpp), pp, 128)
    found = step_time(layout, GPUS["h200"])
    for stage in range(pp):
        slowest = dataclasses.replace(found, stage_us=tuple(float(place == stage) for place in range(pp)))
        sent = {each.name: each for each in traffic_of(layout, GPUS["h200"], slowest)}
        messages = 2 * vpp - (stage in (0, pp - 1))
        assert sent["send/pp"].sent_bytes == 32 * messages * 64 * 64 * 4


def test_traffic_behind_the_passes_is_of_the_stage_whose_time_counts() -> None:
    """Tables on the first stage alone, while the last one is the slowest in its passes."""
    memory = dataclasses.replace(MEMORY.memory, layers=(2,))
    layout = Layout.of(dataclasses.replace(MEMORY, memory=memory).with_parallel(pp=2, mp=2, mp_rows=2), 8, 128)
    found = dataclasses.replace(step_time(layout, GPUS["h200"]), stage_us=(1.0, 2.0))
    assert (found.slowest_stage, found.gradients_stage) == (1, 0)
    sent = {each.name: each for each in traffic_of(layout, GPUS["h200"], found)}
    assert sent["copy_sync"].sent_bytes > 0 and sent["copy_sync"].seconds > 0
    gradients = dense_bytes(layout, 0).gradients
    assert sent["all_reduce/dp"].sent_bytes == pytest.approx(2 * 3 / 4 * gradients)


def test_selective_recomputation_leaves_experts_alone() -> None:
    """Their tokens travel once more under full recomputation only."""
    run = dataclasses.replace(DENSE, moe=MoeConfig(num_experts=4, ffn_hidden_size=64)).with_parallel(ep=2)
    again = {
        how: dataclasses.replace(run, train=dataclasses.replace(run.train, recompute=how))
        for how in ("none", "selective", "full")
    }
    times = {how: predicted(each, 2, GPUS["h200"]).parts["all_to_all/ep"] for how, each in again.items()}
    assert times["selective"] == pytest.approx(times["none"]) and times["full"] == pytest.approx(1.5 * times["none"])
    layout = Layout.of(again["selective"], 2, 128)
    found = step_time(layout, GPUS["h200"])
    sent = {each.name: each for each in traffic_of(layout, GPUS["h200"], found)}
    plain = Layout.of(run, 2, 128)
    once = {each.name: each for each in traffic_of(plain, GPUS["h200"], step_time(plain, GPUS["h200"]))}
    assert sent["all_to_all/ep"].sent_bytes == once["all_to_all/ep"].sent_bytes
    assert Step(layout, GPUS["h200"], Disturbance()).timeline.end / 1e12 == pytest.approx(found.seconds, rel=1e-7)


def test_share_of_the_peak_counts_half_keys_forward_alone() -> None:
    """A memory of more sub-keys adds 2 FLOPs a multiply-add, not 6: its backward pass touches the chosen keys."""
    flops = []
    for num_subkeys in (32, 64):
        run = dataclasses.replace(MEMORY, memory=dataclasses.replace(MEMORY.memory, num_subkeys=num_subkeys))
        layout = Layout.of(run, 1, 128)
        plan = Plan(layout=layout, estimate=estimate(run, 1, 128), time=step_time(layout, GPUS["h200"]))
        peak = GPUS["h200"].float32_tflops * 1e12
        flops.append(figures_of(plan, GPUS["h200"]).mfu * plan.time.seconds * peak / (32 * 64))
    # Two layers of two heads and two halves of 16 numbers.
    assert flops[1] - flops[0] == pytest.approx(2 * 2 * 2 * 2 * 16 * 32)


def test_published_recipe_across_nodes_pays_for_the_network() -> None:
    """The 8b recipe in its own layout: tensor parallelism inside nodes, gradients across, and a step of seconds."""
    run = find_recipe("8b_memory_plus_16m_128xh100_bf16")
    layout = Layout.of(run, 128, 128256)
    found = step_time(layout, GPUS["h100"])
    sent = {each.name: each.link for each in traffic_of(layout, GPUS["h100"], found)}
    assert sent["all_gather/tp"] == INSIDE and sent["values_inside"] == INSIDE
    assert sent["reduce_scatter/dp"] == ACROSS and sent["values_across"] == ACROSS
    assert 4 < found.seconds < 12
