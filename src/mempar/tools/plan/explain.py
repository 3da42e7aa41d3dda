"""The arithmetic of the best plan's step, term by term, and what the others lose."""

from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import Hardware
from mempar.tools.plan.compute import block_compute_us
from mempar.tools.plan.planner import Planned
from mempar.tools.plan.report import layout_of
from mempar.tools.plan.roofline import Roofline
from mempar.tools.plan.search import Plan
from mempar.tools.plan.step_time import AGAIN, BUBBLE, COMPUTE, HEAD, StepTime
from mempar.tools.plan.traffic import Traffic, traffic_of
from mempar.tools.plan.update import table_step

# Of a block's phase, forward; `products` backward are twice those forward unless said otherwise.
_FORMULAS = {
    "norms": "10 + 14 passes over T' C numbers",
    "attention": "products [T, C] x [C, (h + 2 g) d / tp] and [T, h d / tp] x [h d / tp, C]; RoPE 8 + 8 passes over "
    "T (h + g) d / tp",
    "core_attn": "2 T s h d / tp FLOPs, causal; backward 2.5 times that",
    "mlp": "products [T, C] x [C, 2 F / tp] and [T, F / tp] x [F / tp, C]; SwiGLU 8 + 12 passes over T F / tp",
    "experts": "the same of a rank's experts, with the router and tokens put in order",
    "query": "product [T', C] x [C, 2 H Q]",
    "topk": "2 H products [T', Q] x [Q, N], scores written and read; backward K keys and queries a list",
    "route": "entries put in the order of their owners",
    "gather": "P T'' M / R rows of D / W columns read, sums written, sent parts joined; backward rows read again",
    "gate": "products [T', C] x [C, D] and [T', D] x [D, C]; 5 + 8 passes over T' D",
    "gradient_sums": "gradients of a block's parameters read, added to those of the step in a wide type",
    HEAD: "product [T, C] x [C, V / tp]; 4 + 3 passes over logits, narrow and wide; its gradients summed",
    AGAIN: "forward parts of what is computed again",
    "dense_update": "state read and written, gradients normed and clipped, weights written",
}
_SENT_FORMULAS = {
    "all_reduce": "a ring: 2 (n - 1) / n B over its slowest link, 2 (n - 1) latencies; a tree where that is faster",
    "all_gather": "a ring: (n - 1) / n B over its slowest link, n - 1 latencies",
    "copy_sync": "a ring: (n - 1) / n B over its slowest link, n - 1 latencies",
    "token_gather": "a ring: (n - 1) / n B over its slowest link, n - 1 latencies",
    "score_gather": "a ring: (n - 1) / n B over its slowest link, n - 1 latencies",
    "reduce_scatter": "a ring: (n - 1) / n B over its slowest link, n - 1 latencies",
    "send": "2 (m + p - 1) sends in 1F1B, 2 (p - 1) that nothing hides when interleaved",
    "all_to_all": "bytes of the busiest link, one latency a call",
}
_LOSING_PARTS = 4


def explain(planned: Planned) -> str:
    """Terms of the first plan's step with formula, numbers and result, and why the other plans are slower."""
    best = planned.found.plans[0]
    lines = [
        f"how {best.time.seconds:.4g} s a step come about, layout 1: {layout_of(best)}",
        "step = m x passes of the slowest stage + bubble + sends + gradients + update; nothing else overlaps",
        *_letters(best.layout),
        *_rates(planned.hardware, best.layout),
        "",
        *(f"  {line}" for line in _terms(best, planned.hardware)),
        f"  {'sum':22} {best.time.seconds * 1e3:12,.2f} ms",
        "",
    ]
    for place, plan in enumerate(planned.found.plans[1:], 2):
        lines.append(_loses(f"layout {place}", best, plan))
    if planned.own is not None and planned.own is not best:
        lines.append(_loses("the recipe's own", best, planned.own))
    return "\n".join([*lines, "", *_sources(planned.hardware)])


def _letters(layout: Layout) -> list[str]:
    run, grid = layout.run, layout.grid
    model = run.model
    head = model.hidden_size // model.num_attention_heads
    padding = f" with {layout.batch.num_padding} of padding" if layout.batch.num_padding else ""
    lines = [
        f"  m={layout.batch.num_micro_batches} micro-batches = {run.train.global_batch_size} samples / (dp={grid.dp} x "
        f"{run.train.micro_batch_size}){padding}",
        f"  T={layout.tokens} tokens of a micro-batch, T'={layout.own_tokens} on a rank between blocks, "
        f"s={run.train.seq_length}, C={model.hidden_size}, F={model.ffn_hidden_size}, h={model.num_attention_heads}, "
        f"g={model.query_groups}, d={head}, V={model.padded_vocab(layout.vocab)}, tp={grid.tp}",
    ]
    for name, memory in run.memories.items():
        lines.append(
            f"  {name}: H={memory.heads}, K={memory.top_k}, M={memory.heads * memory.top_k}, N={memory.num_subkeys}, "
            f"Q={memory.half_key_dim}, D={run.value_dim_of(memory)}, P={grid.mp}, R={grid.mp_rows}, "
            f"W={grid.mp_columns}, T''={-(-layout.tokens // grid.tp)} tokens that a rank looks up"
        )
    return lines


def _rates(hardware: Hardware, layout: Layout) -> list[str]:
    roof = Roofline(hardware, layout.value_bytes)
    across = hardware.topology.across_gb_per_s
    return [
        f"  products at {roof.peak_tflops:g} TFLOP/s x {hardware.matmul_share:.0%}, attention x "
        f"{hardware.attention_share:.0%}; memory at {hardware.memory_gb_per_s:g} GB/s x {hardware.memory_share:.0%}, "
        f"rows x {hardware.gather_share:.0%} with {hardware.row_overhead_bytes} bytes more each; "
        f"{hardware.kernel_us:g} us a kernel",
        f"  links inside a node {hardware.topology.inside.gb_per_s:.4g} GB/s and {hardware.link_latency_us:g} us, "
        f"across {across:.4g} GB/s a rank and {hardware.network_latency_us:g} us",
    ]


def _terms(plan: Plan, hardware: Hardware) -> list[str]:
    """A line for each part of the step, compute first."""
    time, layout = plan.time, plan.layout
    sent = {each.name: each for each in traffic_of(layout, hardware, time)}
    order = sorted(time.parts.items(), key=lambda part: (part[0] not in COMPUTE, -part[1]))
    blocks = _blocks(layout, time, hardware)
    lines = []
    for name, us in order:
        words = (
            _bubble_words(time, layout)
            if name == BUBBLE
            else blocks[name]
            if name in blocks
            else _table_words(layout, name, time)
            if name in ("reduce_rows", "row_update")
            else _sent_words(sent[name])
            if name in sent
            else _FORMULAS.get(name, "")
        )
        lines.append(f"{name:22} {us / 1e3:12,.2f} ms  {words}")
    return lines


def _blocks(layout: Layout, time: StepTime, hardware: Hardware) -> dict[str, str]:
    """For every phase of blocks: how many blocks of the slowest stage, times of one, and the formula."""
    blocks = [block for chunk in layout.chunks_of(time.slowest_stage) for block in chunk.blocks]
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for block in blocks:
        for phase, us in block_compute_us(layout.run, layout, block, hardware).items():
            counts[phase] = counts.get(phase, 0) + 1
            passes = f"{us.forward / 1e3:.3g} + {us.backward / 1e3:.3g} ms"
            found[phase] = f"= {counts[phase]} blocks x {time.num_micro_batches} x ({passes}): {_FORMULAS[phase]}"
    head = time.parts.get(HEAD, 0.0) / 1e3 / time.num_micro_batches
    found[HEAD] = f"= {time.num_micro_batches} x {head:.3g} ms: {_FORMULAS[HEAD]}"
    return found


def _table_words(layout: Layout, name: str, time: StepTime) -> str:
    """Numbers of the tables' sums or update, of the stage whose time counts."""
    words, stage = [], time.gradients_stage if name == "reduce_rows" else time.update_stage
    for memory_name, placed in layout.placement.memories.items():
        if stage not in placed.stages:
            continue
        memory = layout.run.memories[memory_name]
        step = table_step(layout, memory_name, stage)
        if name == "reduce_rows":
            words.append(
                f"{step.deposits.entries:,} entries sorted, a gradient of {step.num_columns} columns read for each, "
                f"{step.deposits.rows:,} rows written, summed early {step.early_sums} times"
                + (f"; {step.copies} copies added" if step.copies > 1 else "")
            )
        else:
            words.append(f"{memory.optimizer} of {step.copied_rows:,} rows x {step.num_columns} columns")
    return "; ".join(words)


def _bubble_words(time: StepTime, layout: Layout) -> str:
    total, slowest = sum(time.stage_us) / 1e3, max(time.stage_us) / 1e3
    vpp = layout.run.parallel.vpp
    return f"= (all stages {total:,.2f} ms - the slowest {slowest:,.2f} ms) / {vpp} virtual stages"


def _sent_words(sent: Traffic) -> str:
    """Bytes of a rank and the rate that they come to, and the formula (parallel/collective_time.py)."""
    kind = sent.name.partition("/")[0]
    formula = _SENT_FORMULAS.get(kind, _SENT_FORMULAS["all_to_all"])
    reached = sent.sent_bytes / sent.seconds / 1e9 if sent.seconds else 0.0
    return f"= {sent.sent_bytes / 1e9:.3g} GB {sent.link}, {reached:.3g} GB/s reached: {formula}"


def _loses(who: str, best: Plan, plan: Plan) -> str:
    """What another plan takes more time for, and less; one that fits barely may be faster than the first."""
    names = {**best.time.parts, **plan.time.parts}
    more = {name: (plan.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0)) / 1e3 for name in names}
    largest = sorted(more.items(), key=lambda part: -abs(part[1]))[:_LOSING_PARTS]
    words = ", ".join(f"{name} {change:+,.1f}" for name, change in largest if abs(change) >= 0.05)
    lost = (plan.time.seconds - best.time.seconds) * 1e3
    how = f"{abs(lost):,.1f} ms {'more' if lost >= 0 else 'less'}"
    return f"{who} ({layout_of(plan)}) takes {how}: {words or 'the same in all parts'}"


def _sources(hardware: Hardware) -> list[str]:
    return [
        "the figures of the hardware are",
        f"  peaks: {hardware.source}",
        f"  shares and latencies: {hardware.shares_source}",
        f"  assumed: {hardware.assumed}",
        "reads are taken to fall evenly on row shards, and every rank to be as fast as the others",
    ]
