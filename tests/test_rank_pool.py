"""Tests of the pool of ranks: what goes wrong in one job is told, and does not reach the next."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from rank_pool import RankFailure, RankPool


@pytest.fixture(scope="module")
def small_pool() -> Iterator[RankPool]:
    pool = RankPool(3, job_seconds=20.0, collective_seconds=15.0)
    yield pool
    processes = [worker.process for worker in pool._workers]
    ids = [process.pid for process in processes]
    pool.close()
    for process_id in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_rank(failing: int) -> None:
    if dist.get_rank() == failing:
        raise ValueError(f"rank {failing} has had enough")
    # The others wait for a rank that does not come.
    dist.all_reduce(torch.zeros(1))


def die_on_rank(dying: int) -> None:
    if dist.get_rank() == dying:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def sleep_for_ever() -> None:
    time.sleep(1000.0)


def test_results_come_by_rank(small_pool: RankPool) -> None:
    assert small_pool.run(3, sum_of_ranks, 1) == [(0, 6), (1, 6), (2, 6)]
    assert small_pool.run(1, sum_of_ranks, 5) == [(0, 5)]


def test_jobs_are_done_whatever_the_order_of_asking(small_pool: RankPool) -> None:
    jobs = [small_pool.submit(world_size, sum_of_ranks, 0) for world_size in (1, 3, 2, 1, 1)]
    for job in reversed(jobs):
        assert job.result() == [(rank, sum(range(job.world_size))) for rank in range(job.world_size)]


@pytest.mark.parametrize("failing", [0, 2])
def test_failure_of_one_rank_is_told_and_ends_the_job(failing: int, small_pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=rf"(?s)rank {failing} raised.*ValueError: rank {failing} has had enough"):
        small_pool.run(3, fail_on_rank, failing)
    assert time.monotonic() - start < 15.0
    assert small_pool.run(3, sum_of_ranks, 0) == [(0, 3), (1, 3), (2, 3)]


def test_dead_rank_is_told_and_replaced(small_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7"):
        small_pool.run(2, die_on_rank, 1)
    assert small_pool.run(3, sum_of_ranks, 0) == [(0, 3), (1, 3), (2, 3)]


def test_hanging_job_is_ended() -> None:
    pool = RankPool(1, job_seconds=1.0)
    try:
        with pytest.raises(RankFailure, match=r"ranks \[0\] did not finish"):
            pool.run(1, sleep_for_ever)
        # On a busy machine a process takes a while to start.
        pool.job_seconds = 60.0
        assert pool.run(1, sum_of_ranks, 0) == [(0, 0)]
    finally:
        pool.close()


def test_pool_refuses_more_ranks_than_it_has(small_pool: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size=4"):
        small_pool.run(4, sum_of_ranks, 0)
