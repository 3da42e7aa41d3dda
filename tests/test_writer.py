"""Megatron's checkpoint writer, in the rank itself: results and failures arrive as from its children."""

from types import SimpleNamespace
from typing import Any

from mempar.runtime.writer import write_in_process


def fake_module(failing: int | None) -> Any:
    class Writer:
        @staticmethod
        def write_preloaded_data(
            transforms: list,
            local_proc_idx: int,
            write_bucket: Any,
            results_queue: Any,
            count_queue: Any,
            **options: Any,
        ) -> None:
            assert options["use_fsync"]
            failed = OSError("disk full") if local_proc_idx == failing else [write_bucket]
            results_queue.put((local_proc_idx, failed))
            count_queue.get()
            count_queue.task_done()

    return SimpleNamespace(FileSystemWriterAsync=Writer)


def write(module: Any) -> Any:
    write_in_process(module)
    results = module._get_write_results_queue()
    module.FileSystemWriterAsync.write_preloaded_data_multiproc([], False, 0, ["a", "b"], results)
    return results.get_nowait()


def test_results_come_by_place() -> None:
    assert write(fake_module(None)) == {0: ["a"], 1: ["b"]}


def test_a_failed_write_is_handed_on() -> None:
    failure = write(fake_module(1))
    assert isinstance(failure, OSError) and "disk full" in str(failure)
