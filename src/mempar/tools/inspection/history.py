"""When rows were read last in training, from the history that a checkpoint has of them."""

from collections import Counter
from collections.abc import Callable

import torch

from mempar.memory.usage import RowHistory, row_figures
from mempar.runtime.checkpoint.manifest import HISTORY_SINCE, MANIFEST, damaged
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.inspection.findings import HistoryFindings
from mempar.tools.inspection.row_blocks import row_blocks
from mempar.tools.page.bins import by_powers


def history_name(source: CheckpointSource, memory: str) -> str:
    """The tensor that holds the history of a memory's rows; empty where the checkpoint has none."""
    name = f"{memory}.last_read"
    return name if name in source.tensors and memory in source.about.get(HISTORY_SINCE, {}) else ""


def read_history(source: CheckpointSource, memory: str, advance: Callable[[int], None]) -> HistoryFindings | None:
    """Count the rows of a memory by when they were read last.

    Args:
        source: the checkpoint.
        memory: its name.
        advance: is told how many more rows were read.

    Returns:
        None where the checkpoint has no history: the run did not watch the memory (`memory.usage_interval=0`), or it
        was saved without an optimizer's state.

    Raises:
        CheckpointError: when a piece is damaged.
    """
    name = history_name(source, memory)
    if not name:
        return None
    step, since = source.manifest.step, source.about[HISTORY_SINCE][memory]
    config = source.run.memories[memory]
    if type(since) is not int or not 0 <= since <= step or source.tensors[name].shape != (config.num_slots,):
        raise damaged(source.root / MANIFEST, f"the history of {memory} is none of {config.num_slots} rows")
    # As metrics count it.
    window = min(config.usage_interval, step - since)
    read_rows = dead_rows = 0
    ages: Counter[int] = Counter()
    for _, last_read in row_blocks(source, name, advance):
        history = RowHistory(0, torch.device("cpu"))
        history.last_read, history.step = last_read, step
        read_rows += history.rows_read_in(window)
        dead_rows += history.rows_never_read()
        age = (step - last_read[last_read > 0].long()).clamp(min=0)
        distinct, numbers = torch.unique(age, return_counts=True)
        ages.update(by_powers(zip(distinct.tolist(), numbers.tolist(), strict=True)))
    return HistoryFindings(
        figures=row_figures(read_rows, dead_rows, config.num_slots, window=window, since=since),
        ages=[[low, number] for low, number in sorted(ages.items())],
    )
