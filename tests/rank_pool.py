"""One warm pool of ranks for a whole test session.

Importing torch and megatron takes seconds, so processes are forked from a server that has done it and
stay between jobs. A job is a function run on `world_size` ranks, in a gloo process group of its own;
afterwards all its groups are gone, so the next job may have another layout. Jobs run side by side
as far as there are free ranks.

    pool.run(4, function, argument)              [result of rank 0, ..., result of rank 3]
    job = pool.submit(2, function, argument)     starts now or when ranks are free; job.result() waits

The function and its arguments are pickled: it must be a top-level function of a module on the path.
"""

import contextlib
import datetime
import gc
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = ["mempar.runtime.step", "mempar.runtime.bringup"]
# What the other ranks of a job get to notice that one of them failed, before they are ended.
# Some of megatron's groups outlive their run (the distributed optimizer's are held through autograd's nodes), each
# with threads that wake up a hundred times a second: a rank that has gathered as many is replaced.
MOST_THREADS = 150
GRACE_SECONDS = 2.0


class RankFailure(AssertionError):
    """A job did not end well; the message holds the traceback of the rank that failed first."""


@dataclass
class Job:
    """A function on some ranks, queued, running or done."""

    number: int
    world_size: int
    payload: bytes
    name: str
    pool: "RankPool"
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    started: float = 0.0
    deadline: float = 0.0
    waiting: set[int] = field(default_factory=set)
    results: dict[int, Any] = field(default_factory=dict)
    failure: str = ""
    failed_at: float = math.inf
    done: bool = False

    def result(self) -> list[Any]:
        """Wait for the job and return its ranks' results in order."""
        self.pool.pump(self)
        if self.failure:
            raise RankFailure(f"{self.name} on {self.world_size} ranks: {self.failure}")
        return [self.results[rank] for rank in range(self.world_size)]


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None
    rank: int = 0


class RankPool:
    """Processes that run jobs; they are started when they are first needed."""

    def __init__(
        self, num_ranks: int = 8, *, job_seconds: float = 120.0, collective_seconds: float = 60.0, busy: int = 0
    ) -> None:
        """Describe the pool; nothing is started yet.

        Args:
            num_ranks: processes at most.
            job_seconds: a job that takes longer is ended and reported.
            collective_seconds: timeout of the process groups.
            busy: jobs run side by side up to so many ranks; 0 means one a core. A larger job runs alone.
        """
        self.num_ranks = num_ranks
        self.busy_ranks = busy or os.cpu_count() or 1
        self.job_seconds, self.collective_seconds = job_seconds, collective_seconds
        self.jobs_run = 0
        self.cpu_seconds = 0.0
        # Or what is preloaded asks the driver for devices, which processes that are forked then cannot use.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[_Worker] = []
        self._queue: deque[Job] = deque()
        self._store: Any = None

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on ranks and return what each of them returned."""
        return self.submit(world_size, function, *args).result()

    def submit(self, world_size: int, function: Callable[..., Any], *args: Any) -> Job:
        """Queue a function; jobs start in the order in which they were queued."""
        if not 1 <= world_size <= self.num_ranks:
            raise ValueError(f"world_size={world_size} must be between 1 and the pool's {self.num_ranks} ranks.")
        self.jobs_run += 1
        name = f"{function.__module__}.{function.__qualname__}"
        job = Job(self.jobs_run, world_size, pickle.dumps((function, args)), name, self)
        self._queue.append(job)
        self._start_jobs()
        return job

    def pump(self, until: Job) -> None:
        """Start queued jobs and collect results until one job is done."""
        while not until.done:
            self._start_jobs()
            busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
            for connection in wait(list(busy), timeout=0.5):
                self._receive(busy[connection])  # type: ignore[index]
            self._end_overdue()

    @property
    def process_ids(self) -> list[int]:
        """Processes that were started."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            # An idle rank leaves when its pipe closes.
            worker.connection.close()
            if worker.job is not None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(2.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers, self._store = [], None
        self._queue.clear()

    def _start_jobs(self) -> None:
        while self._queue:
            job = self._queue[0]
            idle = [worker for worker in self._workers if worker.job is None]
            busy = len(self._workers) - len(idle)
            if busy and busy + job.world_size > self.busy_ranks:
                return
            missing = job.world_size - len(idle)
            if len(self._workers) + missing > self.num_ranks:
                return
            idle += [self._start_worker() for _ in range(missing)]
            self._queue.popleft()
            job.started = time.monotonic()
            job.deadline = job.started + self.job_seconds
            job.waiting = set(range(job.world_size))
            for rank, worker in enumerate(idle[: job.world_size]):
                worker.job, worker.rank = job, rank
                try:
                    worker.connection.send((job.number, rank, job.world_size, job.payload))
                except OSError:
                    self._lose(worker)

    def _start_worker(self) -> _Worker:
        if self._store is None:
            import torch.distributed as dist

            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._store.port, self.collective_seconds), daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _receive(self, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        try:
            number, succeeded, cpu_seconds, num_threads, reply = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._lose(worker)
            return
        assert number == job.number
        job.cpu_seconds += cpu_seconds
        self.cpu_seconds += cpu_seconds
        if succeeded:
            job.results[worker.rank] = reply
        else:
            failed_at, text = reply
            self._fail(job, f"rank {worker.rank} raised\n{text}", failed_at)
        self._release(worker)
        if num_threads > MOST_THREADS:
            self._end(worker)

    def _release(self, worker: _Worker) -> None:
        job, worker.job = worker.job, None
        assert job is not None
        job.waiting.discard(worker.rank)
        if not job.waiting and not job.done:
            job.done, job.seconds = True, time.monotonic() - job.started

    def _fail(self, job: Job, reason: str, failed_at: float) -> None:
        """Keep the first failure: the others are its consequences."""
        if not job.failure:
            job.deadline = min(job.deadline, time.monotonic() + GRACE_SECONDS)
        if failed_at < job.failed_at:
            job.failure, job.failed_at = reason, failed_at

    def _lose(self, worker: _Worker) -> None:
        """A rank died: report it and let another process take its place when one is needed."""
        assert worker.job is not None
        worker.process.join(1.0)
        # A death is told last, and is the cause all the same.
        self._fail(worker.job, f"rank {worker.rank} died with exit code {worker.process.exitcode}", 0.0)
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._end(worker)
        self._release(worker)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
        self._workers.remove(worker)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if w.job is not None and now > w.job.deadline]:
            job = worker.job
            assert job is not None
            stuck = sorted(job.waiting)
            self._fail(job, f"ranks {stuck} did not finish in {now - job.started:.0f} s", now)
            self._drop(worker)


class _Raised(Exception):
    """When and how a job's function failed on this rank."""


def _serve(connection: Connection, store_port: int, collective_seconds: float) -> None:
    """Run jobs in a rank's process until the pool closes the pipe."""
    # A ^C reaches the whole terminal; the pool decides when ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # gloo greets on standard output.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    # Most of megatron's many groups are never used: connect those that are.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What was imported stays: collections after every job need not look through it.
    gc.freeze()
    timeout = datetime.timedelta(seconds=collective_seconds)
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False, timeout=timeout)
    while True:
        try:
            number, rank, world_size, payload = connection.recv()
        except (EOFError, OSError):
            return
        busy = time.process_time()
        try:
            result = _run_job(dist.PrefixStore(f"job{number}", store), rank, world_size, timeout, payload)
            outcome = True, time.process_time() - busy, _count_threads(), result
        except _Raised as raised:
            outcome = False, time.process_time() - busy, _count_threads(), raised.args
        except BaseException:
            failed = time.monotonic(), traceback.format_exc()
            outcome = False, time.process_time() - busy, _count_threads(), failed
        with contextlib.suppress(OSError):
            # Plain pickle: torch's own would pass file descriptors of shared memory.
            connection.send_bytes(pickle.dumps((number, *outcome)))


def _count_threads() -> int:
    import psutil

    return psutil.Process().num_threads()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_job(store: Any, rank: int, world_size: int, timeout: datetime.timedelta, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from mempar.runtime import mcore

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As in the session itself: what our own code warns of is an error.
            warnings.filterwarnings("error", module=r"(mempar|test_|toy)")
            function, args = pickle.loads(payload)
            result = function(*args)
        # A rank that leaves early closes connections that others still read from.
        dist.barrier()
        return result
    except BaseException:
        # Told with its time: what the others then run into is told sooner where tearing down takes long here.
        raise _Raised(time.monotonic(), traceback.format_exc()) from None
    finally:
        mcore.parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # Models and their hooks refer to each other and keep every process group, and its threads, alive.
        gc.collect()
