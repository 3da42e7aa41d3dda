"""Groups on nodes: the slowest of a kind is found, and the share of bytes that leaves a node is that of all groups."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from mempar.parallel.collective_time import all_gather_us
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS
from mempar.tools.plan.communication import attention_collectives
from mempar.tools.simulate.groups import NodePlacements, stage_groups
from mempar.tools.simulate.pieces import PieceMaker
from mempar.tools.simulate.step import Disturbance, Step
from toy import VOCAB, toy_run

# Nodes of three ranks hold no groups of two or four.
H200 = replace(GPUS["h200"], gpus_per_node=3)
CASES: list[tuple[int, dict[str, Any]]] = [
    (12, {"tp": 2, "cp": 2, "mp": 4, "mp_rows": 2, "micro_batches": 3}),
    (12, {"pp": 2, "tp": 2, "mp": 2, "mp_rows": 2, "micro_batches": 3}),
    (8, {"mp": 4, "mp_rows": 2, "mp_hops": 2}),
]


def groups_of(layout: Layout, kind: str, stage: int) -> list[list[int]]:
    """World ranks of every group, by the order of dimensions alone."""
    grid = layout.grid
    first, size = stage * grid.stage_size, grid.stage_size
    ranks = range(first, first + size)
    coordinates = {
        "tp": lambda rank: rank // grid.tp,
        "cp": lambda rank: (rank // (grid.tp * grid.cp), rank % grid.tp),
        "dp": lambda rank: rank % grid.tp,
        "mp": lambda rank: rank // grid.mp,
        "inside": lambda rank: rank // grid.mp_rows,
        "across": lambda rank: (rank // grid.mp, rank % grid.mp_rows),
        "copies": lambda rank: rank % grid.mp,
    }
    by_group: dict[Any, list[int]] = {}
    for rank in ranks:
        by_group.setdefault(coordinates[kind](rank - first), []).append(rank)
    return list(by_group.values())


@pytest.mark.parametrize(("num_ranks", "toy"), CASES)
@pytest.mark.parametrize("kind", ["tp", "cp", "dp", "mp", "inside", "across", "copies"])
def test_slowest_group_is_found(num_ranks: int, toy: dict[str, Any], kind: str):
    layout, topology = Layout.of(toy_run(**toy), num_ranks, VOCAB), H200.topology
    placements = NodePlacements(layout, topology)
    for stage in range(layout.grid.pp):
        every = groups_of(layout, kind, stage)
        assert len(every) * len(every[0]) == layout.grid.stage_size
        members = stage_groups(layout)[kind]
        assert [members.size, members.outer * members.inner] == [len(every[0]), len(every)]
        given = every
        if kind == "cp":
            every = [list(pair) for group in every for pair in itertools.pairwise(group)] or every
            given = [group[:2] for group in given]

        def us(members: Any) -> float:
            return all_gather_us(topology, list(members), 1e6)

        assert us(placements.slowest(kind, given[0], us)) == max(map(us, every))
        left = [sum(p // 3 != q // 3 for p, q in itertools.permutations(group, 2)) for group in every]
        pairs = len(every) * max(1, len(every[0]) * (len(every[0]) - 1))
        assert placements.crossing(kind, given[0]) == pytest.approx(sum(left) / pairs)


def test_groups_that_straddle_nodes_slow_all():
    # On nodes of three the first two ranks share one; ranks 2 and 3 do not.
    layout = Layout.of(toy_run(mp=2, mp_rows=2), 6, VOCAB)
    ends = [Step(layout, replace(H200, gpus_per_node=size), Disturbance()).timeline.end for size in (3, 2)]
    assert ends[0] > ends[1]
    pieces = [
        PieceMaker(layout, each, each.topology).block(0, 1).forward
        for each in (replace(H200, gpus_per_node=size) for size in (3, 1))
    ]
    times = [{piece.phase: piece.us for piece in found if piece.group == "mp"} for found in pieces]
    assert times[0] == times[1] and times[0]["entries"] > 0


def test_a_ring_is_as_slow_as_its_slowest_pair():
    layout = Layout.of(toy_run(cp=4, micro_batches=4), 4, VOCAB)
    maker = PieceMaker(layout, H200, H200.topology)
    (ring,) = attention_collectives(layout, 0).forward
    assert list(ring.members) == [0, 1]
    assert maker.collective_us(ring) == replace(ring, members=(2, 3)).us(H200.topology) > ring.us(H200.topology)
