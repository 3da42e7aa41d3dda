"""What can be refused before anything is started or written; nothing here imports torch."""

import importlib.util
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import check_files, check_lengths
from mempar.runtime.data.tokenizer import parse_spec
from mempar.runtime.placement import place, resolve


def check_layout(run: RunConfig, num_ranks: int) -> RunConfig:
    """Refuse a layout that does not fit the ranks, or that the engine on this machine cannot run.

    Returns:
        The run with what the layout decides filled in.

    Raises:
        ConfigError: with the numbers.
    """
    if num_ranks < 1:
        raise ConfigError(f"--nproc {num_ranks} starts no rank; a run needs at least one; raise it.")
    run = resolve(run, num_ranks)
    place(run, num_ranks)
    if run.parallel.cp > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"parallel.cp={run.parallel.cp} needs TransformerEngine's attention, which is not installed; megatron's "
            "own attention sees one context-parallel rank's tokens only; use parallel.cp=1, or install the extra "
            "`gpu` on a CUDA machine."
        )
    return run


def check_data(run: RunConfig) -> None:
    """Refuse data that is not there, or not what the run takes it for.

    Raises:
        ConfigError: naming the missing file and how to make it, or what does not fit.
    """
    parse_spec(run.data.tokenizer)
    if not run.data.paths:
        raise ConfigError(
            "data.paths is empty; a run needs at least one Megatron .bin/.idx pair; make one with "
            f"`mempar prepare INPUT... --tokenizer {run.data.tokenizer} --out PREFIX` and set "
            "data.paths=[PREFIX], or set data.corpus=stdlib."
        )
    for path in (*run.data.paths, *run.data.heldout_paths):
        for suffix in (".bin", ".idx"):
            if not Path(path + suffix).is_file():
                raise ConfigError(
                    f"{path}{suffix} does not exist; data.paths name pairs of Megatron .bin/.idx files without "
                    f"their suffix; make them with `mempar prepare INPUT... --tokenizer {run.data.tokenizer} "
                    f"--out {path}`."
                )
    check_files(run)
    check_lengths(run)
    if run.train.heldout_samples and not run.data.heldout_paths:
        raise ConfigError(
            f"train.heldout_samples={run.train.heldout_samples} with no data.heldout_paths; a held-out loss needs "
            "data of its own; name some, or set train.heldout_samples=0."
        )
