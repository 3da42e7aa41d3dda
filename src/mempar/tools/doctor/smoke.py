"""Collectives tried out on this machine: ranks under torchrun's agent, and what their reports mean.

The agent is a process of its own, and ranks die with it: whatever hangs, the command goes on after a while.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mempar.tools.doctor import clocks
from mempar.tools.doctor.finding import ERROR, OK, WARNING, Finding, counted, size
from mempar.tools.doctor.smoke_rank import STAGES, Report, lingering, read_reports

_WORKER = "mempar.tools.doctor.smoke_rank"
_CHECK = "smoke.collectives"
# What ranks get to import torch, from a cold disk; and to wait for each other from then on.
START_SECONDS, PATIENCE_SECONDS = 180.0, 60.0
# For the others to say how they fail, when one has failed.
_GRACE_SECONDS = 2.0
_POLL_SECONDS, _POLL_REPORT_SECONDS = 0.1, 2e-3
# Of NVLink's bandwidth: below it, traffic goes another way.
_LINK_SHARE = 0.15
_OF_COLLECTIVES = re.compile(r"gloo|nccl|connection|timed? ?out|broken pipe|socket", re.IGNORECASE)
# Of ranks that failed, in torchrun's summary.
_ENDED = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE)
# By which the agent ends the others.
_TOLD_TO_END = -signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        num_ranks: that were started.
        reports: of those that said anything.
        status: of the agent; None if it was killed for taking too long, or for waiting for ranks that hang.
        output: what was printed.
        ended: exit statuses of ranks that failed, as far as torchrun's agents say.
        seconds: that it took.
    """

    num_ranks: int
    reports: list[Report]
    status: int | None
    output: str = ""
    ended: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


def launch(
    num_ranks: int,
    *,
    patience: float = PATIENCE_SECONDS,
    start_seconds: float = START_SECONDS,
    worker: str = _WORKER,
) -> Outcome:
    """Try collectives on some ranks of this machine; must be called in the main thread.

    Args:
        num_ranks: processes.
        patience: seconds that ranks wait for each other.
        start_seconds: that they may take before.
        worker: module that is a rank.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mempar-doctor-") as name:
        directory, log = Path(name), Path(name, "output")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={directory.name}"]
        command += ["--max-restarts=0", "-m", worker, "--reports", name, "--patience", str(patience)]
        with log.open("wb") as output:
            # A session of its own: ^C ends this command, which then ends the ranks.
            agent = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                wait(lambda: agent.poll() is not None, directory, began + start_seconds + patience, patience)
                status = agent.poll()
            finally:
                agent.kill()
                agent.wait()
        said = log.read_text(errors="replace")
        return Outcome(
            num_ranks=num_ranks,
            reports=read_reports(directory),
            status=status,
            output=said,
            ended=ended_in(said),
            seconds=time.monotonic() - began,
        )


def ended_in(output: str) -> dict[int, int]:
    """Exit statuses of the ranks that failed, by torchrun's summary."""
    return {int(found.group(1)): int(found.group(2)) for found in _ENDED.finditer(output)}


def wait(has_ended: Callable[[], bool], directory: Path, deadline: float, patience: float) -> None:
    """Wait until all is over, but not for ranks that hang: their agents give them half a minute.

    Args:
        has_ended: whether it is.
        directory: of reports.
        deadline: by the monotonic clock.
        patience: seconds that ranks wait for each other.
    """
    while not has_ended() and time.monotonic() < deadline:
        reports = read_reports(directory)
        # A file server is not to be kept busy by those of a thousand ranks.
        time.sleep(_POLL_SECONDS + _POLL_REPORT_SECONDS * len(reports))
        if any(report.error for report in reports):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        elif any(report.waited for report in reports):
            deadline = min(deadline, time.monotonic() + lingering(patience))


def judge(outcome: Outcome, link_gb_per_s: float | None = None) -> list[Finding]:
    """Say what an attempt has shown.

    Args:
        outcome: of it.
        link_gb_per_s: bandwidth between the GPUs of one machine; None if it is not known.
    """
    reports = outcome.reports
    wrong = [report for report in reports if report.wrong]
    if wrong:
        return [_wrong(wrong)]
    if len(reports) == outcome.num_ranks and all(report.stage == "done" for report in reports):
        hosts = {report.host: report.offset for report in reports}
        uncertainty = max(report.uncertainty for report in reports)
        return [_bandwidth(reports, link_gb_per_s), *clocks.skew(hosts, uncertainty)]
    failed = [report for report in reports if report.error]
    own = [report for report in failed if not _OF_COLLECTIVES.search(report.error)]
    if own:
        return [_failed(own[0])]
    if not reports:
        return [_not_started(outcome)]
    if died := _died(outcome):
        return [died]
    if failed and not any(report.waited for report in reports):
        return [_failed(failed[0])]
    return [_hangs(outcome)]


def _died(outcome: Outcome) -> Finding | None:
    """The rank that ended without a word, if one did; those that the agent ended did not die by themselves."""
    silent = {report.rank: report for report in outcome.reports if not report.error and not report.waited}
    for rank, status in outcome.ended.items():
        if status != _TOLD_TO_END and rank in silent:
            return _crashed(silent[rank], status)
    return None


def _wrong(reports: list[Report]) -> Finding:
    what = "; ".join(f"rank {report.rank} on {report.host}: {', '.join(report.wrong)}" for report in reports[:4])
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"collectives delivered other numbers than were sent: {what}",
        rule="training on such a machine is wrong without a sign of it",
        remedy="try again on fewer ranks to find the device or link, and another torch build; leave that host out",
        values={"ranks": [report.rank for report in reports]},
    )


def _bandwidth(reports: list[Report], link_gb_per_s: float | None) -> Finding:
    first, world = reports[0], len(reports)
    hosts = list(dict.fromkeys(report.host for report in reports))
    who = f"{counted(world, 'rank')} on {', '.join(hosts[:4])}{' ...' * (len(hosts) > 4)} over {first.backend}"
    values = {"ranks": world, "hosts": hosts, "backend": first.backend, "num_bytes": first.num_bytes}
    if world == 1:
        return Finding(check=_CHECK, level=OK, what=f"{who}: starts and ends", values=values)
    # Bytes that every rank sends, over the time of the slowest.
    slowest = {name: max(report.seconds[name] for report in reports) for name in first.seconds}
    share = {"all_reduce": 2 * (world - 1) / world, "all_to_all": (world - 1) / world}
    rates = {name: share[name] * first.num_bytes / seconds for name, seconds in slowest.items()}
    speeds = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    what = f"{who}: all right; a rank sends {speeds} ({size(first.num_bytes)})"
    values |= {f"{name}_bytes_per_s": rate for name, rate in rates.items()}
    if link_gb_per_s and len(hosts) == 1 and rates["all_reduce"] < _LINK_SHARE * link_gb_per_s * 1e9:
        return Finding(
            check=_CHECK,
            level=WARNING,
            what=what,
            rule=f"NVLink between these GPUs carries {link_gb_per_s:g} GB/s in a direction",
            remedy="see nvidia-smi topo -m and nvidia-smi nvlink -s; NCCL_DEBUG=INFO shows the way that NCCL takes "
            "(NCCL_P2P_DISABLE and a small /dev/shm bar the fast ones)",
            values=values,
        )
    return Finding(check=_CHECK, level=OK, what=what, values=values)


def _failed(report: Report) -> Finding:
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"rank {report.rank} on {report.host} failed in {report.stage}: {report.error}",
        rule="training begins with the same collectives on the same backend",
        remedy=_network_remedy(report.backend),
        values={"ranks": [report.rank], "stage": report.stage},
    )


def _crashed(report: Report, status: int) -> Finding:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"rank {report.rank} on {report.host} {how} in {report.stage}, without a word",
        rule="a crash in native code, or the kernel out of memory (signal 9)",
        remedy="look at dmesg, at the limits above, and at the versions of driver, torch and NCCL",
        values={"ranks": [report.rank], "status": status},
    )


def _not_started(outcome: Outcome) -> Finding:
    last = outcome.output.strip().rpartition("\n")[2][:300]
    how = "did not start in time" if outcome.status is None else f"ended with status {outcome.status}"
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"none of {outcome.num_ranks} ranks started within {outcome.seconds:.0f} s; torchrun {how}: {last}",
        rule="ranks are started by torchrun, as mempar train does",
        remedy="see that `python -m torch.distributed.run --help` answers, and that localhost resolves to 127.0.0.1",
    )


def _hangs(outcome: Outcome) -> Finding:
    """Nobody failed by itself: those that had come least far, or never said that they waited, keep the others."""
    said = {report.rank: report for report in outcome.reports}
    absent = [rank for rank in range(outcome.num_ranks) if rank not in said]
    least = min(report.progress for report in outcome.reports)
    behind = [report for report in outcome.reports if report.progress == least]
    silent = [report for report in behind if not report.waited and not report.error] or behind
    if absent:
        missing, who = absent, f"rank {', '.join(map(str, absent))} never started"
    else:
        missing = [report.rank for report in silent]
        names = ", ".join(f"{report.rank} on {report.host}" for report in silent[:8])
        who = f"rank {names} hangs in {silent[0].stage}"
        if len(silent) == outcome.num_ranks:
            who = f"all {len(silent)} ranks wait for each other in {silent[0].stage}"
    waiting = [report for report in outcome.reports if report.rank not in missing]
    ahead = max(waiting, key=lambda report: report.progress, default=None)
    others = f"; {len(waiting)} others wait in {ahead.stage}" if ahead else ""
    backend = next((report.backend for report in outcome.reports if report.backend), "")
    return Finding(
        check=_CHECK,
        level=ERROR,
        what=f"{who}{others}; ended after {outcome.seconds:.0f} s",
        rule=f"every rank passes {', '.join(STAGES[1:4])} and more within a minute, and waits for all others there",
        remedy=_network_remedy(backend)
        if ahead is None
        else f"look at that rank's host and device; {_network_remedy(backend)}",
        values={"ranks": missing, "stages": {str(report.rank): report.stage for report in outcome.reports}},
    )


def _network_remedy(backend: str) -> str:
    if backend == "nccl":
        return "set NCCL_DEBUG=INFO and run it again; see the interfaces, /dev/shm and limits above"
    return "see the interfaces above, name the right one in GLOO_SOCKET_IFNAME, and let no firewall stand between hosts"
