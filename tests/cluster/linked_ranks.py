"""Ranks on hosts that measure their links and exchange on them, when they are asked to; see exchange_rank.py."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from hosts import INTERFACE, Hosts, wait_for
from mempar.parallel.cost import ExchangeBytes
from mempar.parallel.exchange_time import exchange_us
from mempar.parallel.links import Link, Topology
from mempar.parallel.shard_plan import ShardPlan
from shaped_links import first_of_all
from thread_groups import plan_of

RANKS_PER_HOST = 2
_PORT = 29533
_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One exchange: how a table is cut, and what is read.

    Attributes:
        name: of the layout.
        plan: cuts of the table.
        token_counts: of each rank.
        hops: of values and output gradients.
        reads: M.
    """

    name: str
    plan: ShardPlan
    token_counts: tuple[int, ...]
    hops: int = 1
    reads: int = 16


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What an exchange took, and what was predicted.

    Attributes:
        predicted_us: by phase, from the links alone.
        measured_us: by phase, medians over repetitions of the time from the last rank's call to the last one's end.
        total_us: median of the measured sums.
        sent_bytes: by each rank, from the ledger.
        owned: entries of each rank by row shard.
        interface_bytes: what the first host's interface sent, the least of all repetitions.
    """

    predicted_us: dict[str, float]
    measured_us: dict[str, float]
    total_us: float
    sent_bytes: list[dict[str, int]]
    owned: list[list[int]]
    interface_bytes: int


class LinkedRanks:
    """Two ranks on every host, from `with LinkedRanks(hosts)` on until its end."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.size = RANKS_PER_HOST * len(hosts.names)
        self._asked = 0

    def __enter__(self) -> "LinkedRanks":
        self.directory = Path(tempfile.mkdtemp(dir=self.hosts.directory))
        common = [f"WORLD_SIZE={self.size}", f"MASTER_ADDR={self.hosts.addresses[self.hosts.names[0]]}"]
        common += [f"MASTER_PORT={_PORT}", f"GLOO_SOCKET_IFNAME={INTERFACE}", "OMP_NUM_THREADS=1"]
        script = str(Path(__file__).with_name("exchange_rank.py"))
        command = [sys.executable, script, str(self.directory), str(os.getpid())]
        with (self.directory / "ranks.log").open("w") as log:
            self._ranks = [
                self.hosts.start(
                    first_of_all(["env", *common, f"RANK={rank}", *command]),
                    on=self.hosts.names[rank // RANKS_PER_HOST],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(self.size)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write({"what": "end"})
                for process in self._ranks:
                    process.wait(timeout=_SECONDS)
        finally:
            for process in self._ranks:
                process.kill()
                process.wait()

    def probe(self) -> Topology:
        """What the ranks measure of their links."""
        told = self._ask({"what": "probe"})[0]
        return Topology(**{**told, "inside": Link(**told["inside"]), "across": Link(**told["across"])})

    def exchange(self, lookup: Lookup, topology: Topology, repeats: int = 3) -> Timed:
        """Exchange some times over."""
        asked = {**asdict(lookup), "what": "exchange", "seed": sum(lookup.token_counts), "repeats": repeats}
        answers = self._ask(asked)
        calls = [answer["calls"] for answer in answers]
        per_repeat = len(calls[0]) // repeats
        sums: list[dict[str, float]] = [defaultdict(float) for _ in range(repeats)]
        for i, together in enumerate(zip(*calls, strict=True)):
            (phase,) = {phase for phase, _, _ in together}
            sums[i // per_repeat][phase] += 1e6 * (
                max(end for _, _, end in together) - max(start for _, start, _ in together)
            )
        predicted = exchange_us(
            topology,
            lookup.plan,
            range(self.size),
            answers[0]["owned"],
            list(lookup.token_counts),
            reads=lookup.reads,
            value_bytes=4,
            hops=lookup.hops,
        )
        return Timed(
            predicted_us={field.name: us for field in fields(ExchangeBytes) if (us := getattr(predicted, field.name))},
            measured_us={phase: _median([each[phase] for each in sums]) for phase in sums[0]},
            total_us=_median([sum(each.values()) for each in sums]),
            sent_bytes=[answer["ledger"] for answer in answers],
            owned=answers[0]["owned"],
            interface_bytes=min(answers[0]["interface_bytes"]),
        )

    def _ask(self, what: dict[str, Any]) -> list[Any]:
        number = self._asked
        self._write(what)
        paths = [self.directory / f"answer-{number}-{rank}.json" for rank in range(self.size)]

        def answered() -> bool:
            ended = any(process.poll() is not None for process in self._ranks)
            return ended or all(path.exists() for path in paths)

        if not wait_for(answered, _SECONDS) or not all(path.exists() for path in paths):
            raise AssertionError(f"no answer to {what}: {(self.directory / 'ranks.log').read_text()}")
        return [json.loads(path.read_text()) for path in paths]

    def _write(self, what: dict[str, Any]) -> None:
        path = self.directory / f"ask-{self._asked}.json"
        path.with_suffix(".part").write_text(json.dumps(what))
        path.with_suffix(".part").rename(path)
        self._asked += 1


def lookups(num_tokens: int) -> list[Lookup]:
    """Rows, columns and a grid in one hop and two, with about so many tokens a rank, never equally many."""
    counts = tuple(num_tokens * share // 16 for share in (18, 13, 17, 16))
    plans = {"rows": (4, 1, 1), "columns": (1, 4, 1), "grid": (2, 2, 1), "grid in two hops": (2, 2, 2)}
    return [
        Lookup(name=name, plan=plan_of(rows, columns, 4096, 256, 1), token_counts=counts, hops=hops)
        for name, (rows, columns, hops) in plans.items()
    ]


def _median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
