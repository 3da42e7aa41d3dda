"""How the ranks of every node ended, as their own launchers saw it, for the others to read.

A rank that is killed leaves nothing behind that says by what; the launcher on its node knows. So each leaves a file
beside the signs of life. Nothing here imports torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mempar.runtime.durable import replace_file
from mempar.runtime.launch.endings import RankEnd
from mempar.runtime.launch.heartbeat import files_in

_SUFFIX = ".ended.json"


@dataclass(frozen=True, kw_only=True)
class NodeEnd:
    """What a node's launcher says of its ranks.

    Attributes:
        node_rank: which node.
        ends: one for each rank of which anything is known.
    """

    node_rank: int
    ends: list[RankEnd]

    @property
    def has_failed(self) -> bool:
        """Whether any of them did not end well."""
        return any(end.has_failed for end in self.ends)


def record_node_end(directory: Path, end: NodeEnd) -> None:
    """Leave behind how this node's ranks ended."""
    rows = [
        {
            "rank": rank.rank,
            "status": rank.status,
            "ended_at": rank.ended_at,
            "killed": rank.killed,
            "stopped": rank.stopped,
            "stack": rank.stack,
        }
        for rank in end.ends
    ]
    replace_file(directory / f"node_{end.node_rank:05d}{_SUFFIX}", json.dumps(rows).encode())


def read_node_ends(directory: Path) -> dict[int, NodeEnd]:
    """What launchers left behind, by the numbers of their nodes."""
    found = {}
    for path in files_in(directory, _SUFFIX):
        try:
            number = int(path.name.removeprefix("node_").removesuffix(_SUFFIX))
            ends = [RankEnd(**row) for row in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            # Not yet on this node's side of a shared file system.
            continue
        found[number] = NodeEnd(node_rank=number, ends=ends)
    return found
