"""The groups of a stage: who meets whom, and how differently groups of one kind lie on nodes.

All groups of a kind are the first one, shifted by some ranks, so that a shift by a whole node changes nothing. Where
nodes do not hold whole groups, some of these straddle two and others do not: a kind takes as long as its slowest group,
because ranks of a stage meet again and again in groups of other kinds.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from mempar.parallel.links import Topology
from mempar.runtime.estimate.layout import Layout
from mempar.tools.simulate.timeline import Members


def stage_groups(layout: Layout) -> dict[str, Members]:
    """The groups of each kind in a stage: tensor fastest, then context, then data (parallel/ranks.py)."""
    grid, size = layout.grid, layout.grid.stage_size
    rows = grid.mp_rows
    sizes = {
        "tp": (size // grid.tp, grid.tp, 1),
        "cp": (size // (grid.tp * grid.cp), grid.cp, grid.tp),
        "ep": (size // (grid.tp * grid.ep), grid.ep, grid.tp),
        "dp": (1, size // grid.tp, grid.tp),
        "mp": (size // grid.mp, grid.mp, 1),
        "inside": (size // rows, rows, 1),
        "across": (size // grid.mp, grid.mp_columns, rows),
        "copies": (1, size // grid.mp, grid.mp),
        "embedding": (size, 1, 1),
        "world": (1, size, 1),
        "pp": (size, 1, 1),
    }
    return {kind: Members(*each, kind) for kind, each in sizes.items()}


class NodePlacements:
    """How groups lie on nodes."""

    def __init__(self, layout: Layout, topology: Topology) -> None:
        self._topology = topology
        self._shifts = {kind: self._shifts_of(members) for kind, members in stage_groups(layout).items()}

    def slowest(self, kind: str, members: Sequence[int], us: Callable[[Sequence[int]], float]) -> Sequence[int]:
        """World ranks that lie like the slowest group of a kind.

        Args:
            kind: of the group; of `cp`, what the first member sends to the second stands for the ring.
            members: world ranks of the first group.
            us: microseconds of a group of given world ranks.
        """
        return max((shifted(members, shift) for shift in self._shifts[kind]), key=us)

    def crossing(self, kind: str, members: Sequence[int], *, ring: bool = False) -> float:
        """Share of what members send that leaves their node, of all groups on average.

        Args:
            kind: of the group.
            members: world ranks of the first group.
            ring: whether each sends to the next one, and not to all others.
        """
        shifts = self._shifts[kind]
        total = sum(self._crossing(shifted(members, shift), ring=ring) * count for shift, count in shifts.items())
        return total / shifts.total()

    def _shifts_of(self, members: Members) -> Counter[int]:
        """How many groups lie like the first one, shifted by so many ranks."""
        outer, size, inner = members.outer, members.size, members.inner
        firsts = (group * size * inner + place for group in range(outer) for place in range(inner))
        if members.kind == "cp":
            # Of a ring every consecutive pair counts.
            firsts = (first + member * inner for first in list(firsts) for member in range(max(1, size - 1)))
        return Counter(first % self._topology.ranks_per_node for first in firsts)

    def _crossing(self, members: Sequence[int], *, ring: bool) -> float:
        nodes = [self._topology.node_of(rank) for rank in members]
        present = Counter(nodes)
        if len(present) == 1:
            return 0.0
        if ring:
            return len(present) / len(nodes)
        same = sum(count * (count - 1) for count in present.values())
        return 1.0 - same / (len(nodes) * (len(nodes) - 1))


def shifted(members: Sequence[int], shift: int) -> Sequence[int]:
    """World ranks so many further on."""
    if isinstance(members, range):
        return range(members.start + shift, members.stop + shift, members.step)
    return [rank + shift for rank in members]
