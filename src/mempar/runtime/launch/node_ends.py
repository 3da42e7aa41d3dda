"""How the ranks of every node ended, as their own launchers saw it, for the others to read.

A rank that is killed leaves nothing behind that says by what; the launcher on its node knows. So each leaves a file
beside the signs of life, with the last sign of each rank: what ranks write into mapped files may stay on their node for
half a minute where the directory lies on a network. Nothing here imports torch.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mempar.runtime.durable import replace_file
from mempar.runtime.launch.endings import RankEnd
from mempar.runtime.launch.heartbeat import Phase, Sign, files_in

_SUFFIX = ".ended.json"


@dataclass(frozen=True, kw_only=True)
class NodeEnd:
    """What a node's launcher says of its ranks.

    Attributes:
        node_rank: which node.
        ends: one for each rank of which anything is known.
        stopped_early: the signal that ended them before the first step; empty if none did.
    """

    node_rank: int
    ends: list[RankEnd]
    stopped_early: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether any of them did not end well."""
        return any(end.has_failed for end in self.ends)


def record_node_end(directory: Path, end: NodeEnd) -> None:
    """Leave behind how this node's ranks ended, if there is a place for it.

    The head deletes the directory when the run is done, which may be before this node is.
    """
    rows = [
        {
            "rank": rank.rank,
            "status": rank.status,
            "ended_at": rank.ended_at,
            "killed": rank.killed,
            "stopped": rank.stopped,
            "stack": rank.stack,
            "sign": rank.sign and asdict(rank.sign),
        }
        for rank in end.ends
    ]
    with suppress(OSError):
        said = {"stopped_early": end.stopped_early, "ranks": rows}
        replace_file(directory / f"node_{end.node_rank:05d}{_SUFFIX}", json.dumps(said).encode())


def read_node_ends(directory: Path) -> dict[int, NodeEnd]:
    """What launchers left behind, by the numbers of their nodes."""
    found = {}
    for path in files_in(directory, _SUFFIX):
        try:
            number = int(path.name.removeprefix("node_").removesuffix(_SUFFIX))
            said = json.loads(path.read_text())
            ends = [RankEnd(**{**row, "sign": _sign(row["sign"])}) for row in said["ranks"]]
            found[number] = NodeEnd(node_rank=number, ends=ends, stopped_early=str(said["stopped_early"]))
        except (OSError, ValueError, TypeError, KeyError):
            # Not yet on this node's side of a shared file system.
            continue
    return found


def _sign(said: dict[str, Any] | None) -> Sign | None:
    return Sign(**{**said, "phase": Phase(said["phase"])}) if said else None
