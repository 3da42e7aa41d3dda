"""What one rank recorded, and the file in which it leaves that to whoever started it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mempar.marks import Note, Span


@dataclass(frozen=True, kw_only=True)
class ShardReads:
    """How often rows of this rank's shard of one table were read.

    Attributes:
        table: its name.
        num_rows: of the shard.
        rows_by_reads: pairs of a number of reads, and the number of rows that were read so often; most reads first,
            without the rows that were not read.
    """

    table: str
    num_rows: int
    rows_by_reads: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The recorded steps of one rank.

    Attributes:
        rank: world rank.
        seconds: of each step.
        mark_us: what one mark costs here.
        group_sizes: ranks of each of its groups that has several.
        spans: of all steps.
        notes: counts of all steps.
        tables: reads of its shards.
        device: what it computes on.
        ceiling: what its groups' links carry at best, see `ceiling.py`; the same on all ranks.
    """

    rank: int
    seconds: list[float]
    mark_us: float
    group_sizes: dict[str, int]
    spans: list[Span]
    notes: list[Note]
    tables: list[ShardReads]
    device: str = ""
    ceiling: list[dict[str, Any]] = field(default_factory=list)

    def save(self, directory: Path) -> None:
        """Write it to a file of this rank."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("spans", "notes", "tables"):
            fields[name] = [dataclasses.astuple(each) for each in fields[name]]
        path_of(directory, self.rank).write_text(json.dumps(fields))

    @classmethod
    def load(cls, directory: Path, rank: int) -> "Recording":
        """Read what a rank of this version wrote."""
        fields = json.loads(path_of(directory, rank).read_text())
        fields["spans"] = [Span(*each) for each in fields["spans"]]
        fields["notes"] = [
            Note(step, layer, micro_batch, name, tuple(counts))
            for step, layer, micro_batch, name, counts in fields["notes"]
        ]
        fields["tables"] = [
            ShardReads(table=table, num_rows=num_rows, rows_by_reads=[(reads, rows) for reads, rows in pairs])
            for table, num_rows, pairs in fields["tables"]
        ]
        return cls(**fields)


def path_of(directory: Path, rank: int) -> Path:
    """The file of a rank."""
    return directory / f"recording_{rank:05d}.json"
