"""Megatron's checkpoint writer without child processes.

megatron-core 0.16 writes every rank's file in a forked process and collects the results through the
manager of a spawned one, also when the save is synchronous: a fork of a process with threads (and CUDA),
a second import of the main script, and a second a rank. Here the same writer runs in the rank itself.
"""

import queue
from typing import Any


class _NoCount:
    """Stands for the queue on which a child process says that it is done."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def write_in_process(module: Any) -> None:
    """Make synchronous saves write in the calling process.

    Args:
        module: megatron's dist_checkpointing.strategies.filesystem_async.
    """
    writer = module.FileSystemWriterAsync

    def write_buckets(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any) -> None:
        written: Any = {}
        for place, bucket in enumerate(buckets):
            outcome: queue.SimpleQueue = queue.SimpleQueue()
            writer.write_preloaded_data(
                transforms,
                local_proc_idx=place,
                write_bucket=bucket,
                results_queue=outcome,
                count_queue=_NoCount(),
                use_fsync=True,
                use_msc=use_msc,
            )
            _, written[place] = outcome.get()
            if isinstance(written[place], Exception):
                # The receiving side raises it on every rank.
                written = written[place]
                break
        results.put(written)

    module._get_write_results_queue = queue.SimpleQueue
    writer.write_preloaded_data_multiproc = staticmethod(write_buckets)
