"""How long an exchange takes when reads do not fall evenly: entries out, score gradients back, rows read by owners.

The collectives of parallel/exchange_time.py whose bytes depend on who owns the rows, priced as `all_to_all_us` does,
for all memory-parallel groups of a stage at once: what a rank sends to another depends on the latter's row shard
alone, so sums over the row shards of a node stand for sums over pairs. Sums of rows and output gradients have the same
bytes wherever rows lie.
"""

from dataclasses import dataclass, replace

import numpy as np

from mempar.parallel.links import Link, Topology, transfer_us
from mempar.parallel.shard_plan import ShardPlan


@dataclass(frozen=True)
class Busiest:
    """Most entries that pass one place in an all-to-all of entries, either way, for each group `[G]`.

    Attributes:
        inside: between a rank and the others of its node.
        across: between a rank and other nodes.
        node: between a node and the others, of each of its members on average.
    """

    inside: np.ndarray
    across: np.ndarray
    node: np.ndarray

    def us(self, topology: Topology, entry_bytes: int) -> np.ndarray:
        """Microseconds of an all-to-all of so many bytes an entry, there or back: `[G]`."""
        way_out = replace(topology.across, gb_per_s=topology.node_gb_per_s / topology.ranks_per_node)
        inside, across, node = (
            _us(link, entries, entry_bytes)
            for link, entries in (
                (topology.inside, self.inside),
                (topology.across, self.across),
                (way_out, self.node),
            )
        )
        return np.maximum(inside, np.maximum(across, node))


class ExchangeLoad:
    """Entries of the memory-parallel groups of a stage.

    Attributes:
        received: `[n]`, entries that each rank is asked for.
        busiest: the places that bound an all-to-all.
    """

    def __init__(self, entries: np.ndarray, plan: ShardPlan, topology: Topology, first_rank: int) -> None:
        """Count what is sent where.

        Args:
            entries: `[n, R]`, of each rank of the stage for each row shard.
            plan: the cuts.
            topology: the links.
            first_rank: of the stage.
        """
        size, rows = plan.num_shards, plan.num_row_shards
        sent = entries.reshape(-1, size, rows).astype(np.float64)
        row_of = np.arange(size) % rows
        own = _of_own_rows(sent, row_of)
        # Which node of its group each member is on: [G, V, P].
        node = (first_rank + np.arange(len(entries)).reshape(-1, size)) // topology.ranks_per_node
        node -= node[:, :1]
        on_node = (node[:, None, :] == np.arange(node.max() + 1)[None, :, None]).astype(np.float64)
        holders = on_node @ np.eye(rows)[row_of]
        out_all = sent.sum(2) * plan.num_column_shards - own
        in_all = sent.sum(1)[:, row_of] - own
        # Of each member: entries for the holders on its node, entries of its node's members for its rows.
        out_inside = (sent * np.take_along_axis(holders, node[..., None], 1)).sum(2) - own
        asked = np.take_along_axis(on_node @ sent, node[..., None], 1)
        in_inside = _of_own_rows(asked, row_of) - own
        out_across, in_across = out_all - out_inside, in_all - in_inside
        present = np.maximum(on_node.sum(2), 1.0)
        by_node = [(on_node @ side[..., None])[..., 0] / present for side in (out_across, in_across)]
        self.received = (in_all + own).reshape(-1)
        self.busiest = Busiest(
            inside=np.maximum(out_inside, in_inside).max(1),
            across=np.maximum(out_across, in_across).max(1),
            node=np.maximum(*by_node).max(1),
        )


def _us(link: Link, entries: np.ndarray, entry_bytes: int) -> np.ndarray:
    """A message of entries on a link; none takes no time."""
    return np.where(entries > 0, link.latency_us + transfer_us(1.0, link.gb_per_s) * entry_bytes * entries, 0.0)


def _of_own_rows(numbers: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Of `[G, P, R]` the number that belongs to each member's own row shard: `[G, P]`."""
    return numbers[:, np.arange(len(row_of)), row_of]
