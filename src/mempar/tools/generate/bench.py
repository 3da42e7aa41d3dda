"""How fast a memory model generates, beside a dense model of as many FLOPs.

The dense model is the same model with feed-forward networks where its memory layers stand (or without them, where they
stand beside one); of what width the networks are, the FLOPs decide. Its other weights are those of the memory model,
the networks' are random: nothing that is measured depends on values. Both are measured in one process, in turn, so that
whatever else the machine does meets both. Tokens are drawn evenly from the vocabulary, which spreads the reads of a
table wider than text does.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig
from mempar.runtime.in_flight import InFlight
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.forward import Forward
from mempar.runtime.inference.opened import OpenedModel, check_tables, open_model, table_bytes
from mempar.runtime.model import Model, build_for_reading
from mempar.runtime.size import model_size
from mempar.tools.generate.bench_table import bench_table

# Sequences at a time.
_BATCH_SIZES = (1, 8)
# Tokens of the prompt, at the most, and of what is generated after it.
_PROMPT_TOKENS, _NEW_TOKENS = 256, 32
# How often both are measured at a batch size: as often as the seconds allow, within limits.
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 15, 20.0
# Of the width of a feed-forward network: what matrix products like.
_WIDTH_STEP = 8


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Both models in one phase, at one batch size.

    Attributes:
        phase: `prefill` (a prompt is read at once) or `decode` (token by token behind it).
        batch_size: sequences.
        tokens: of each sequence, in one measurement.
        memory_seconds: of each measurement of the memory model.
        dense_seconds: of the dense one.
    """

    phase: str
    batch_size: int
    tokens: int
    memory_seconds: list[float]
    dense_seconds: list[float]

    @property
    def memory_per_s(self) -> float:
        """Tokens/s of the memory model, of all sequences together, in the median."""
        return self.batch_size * self.tokens / statistics.median(self.memory_seconds)

    @property
    def dense_per_s(self) -> float:
        """The same of the dense model."""
        return self.batch_size * self.tokens / statistics.median(self.dense_seconds)

    @property
    def ratio(self) -> float:
        """Speed of the memory model to that of the dense one."""
        return self.memory_per_s / self.dense_per_s


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured, on what.

    Attributes:
        checkpoint: the memory model.
        device: what computed.
        threads: of the CPU.
        torch: its version.
        dtype: that both computed in.
        tables: where tables were, and their size in bytes.
        memory_flops: of a token in a forward pass at the training length.
        dense_flops: the same of the dense model.
        dense_ffn: width of its feed-forward networks.
        speeds: prefill and decode for every batch size.
    """

    checkpoint: str
    device: str
    threads: int
    torch: str
    dtype: str
    tables: str
    table_bytes: int
    memory_flops: int
    dense_flops: int
    dense_ffn: int
    speeds: list[Speeds]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of it, and what follows from it."""
        rows = [
            {**asdict(each), "memory_per_s": each.memory_per_s, "dense_per_s": each.dense_per_s, "ratio": each.ratio}
            for each in self.speeds
        ]
        return {**asdict(self), "speeds": rows}


def bench(path: Path, *, tables: str, as_json: bool, say: Callable[[str], None]) -> None:
    """Measure a checkpoint, and print what came of it.

    Raises:
        ConfigError: for a model without memory layers, or what is no checkpoint.
    """
    place = check_tables(tables)
    with open_model(find_checkpoint(path), tables=place) as opened:
        if not opened.run.memories:
            raise ConfigError(
                f"{opened.checkpoint} has no memory layers; --bench holds a memory model beside a dense one; name a "
                "checkpoint of one."
            )
        result = measure(opened)
    say(json.dumps(result.as_dict(), indent=1) if as_json else bench_table(result))


def measure(opened: OpenedModel) -> BenchResult:
    """Measure an opened memory model beside its dense twin."""
    dense_run = dense_like(opened.run, opened.vocab_size)
    dense = Forward(dense_twin(opened, dense_run), dense_run, opened.world, opened.vocab_size)
    prompt = min(_PROMPT_TOKENS, opened.max_length // 2)
    new = min(_NEW_TOKENS, opened.max_length - prompt)
    speeds: list[Speeds] = []
    for batch_size in _BATCH_SIZES:
        tokens = torch.randint(
            opened.vocab_size, (batch_size, prompt + new), generator=torch.Generator().manual_seed(batch_size)
        ).to(opened.device)
        speeds += _in_turn(opened.forward, dense, tokens, prompt)
    flops = [_flops(run, opened.vocab_size) // 3 for run in (opened.run, dense_run)]
    return BenchResult(
        checkpoint=str(opened.checkpoint),
        device=_device_name(opened.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dtype=opened.run.train.dtype,
        tables=opened.tables,
        table_bytes=table_bytes(opened.manifest, opened.run),
        memory_flops=flops[0],
        dense_flops=flops[1],
        dense_ffn=dense_run.model.ffn_hidden_size,
        speeds=speeds,
    )


def dense_twin(opened: OpenedModel, run: RunConfig) -> Model:
    """Build the dense model: its weights are those of the memory model where that has them, random elsewhere.

    Args:
        opened: the memory model.
        run: see `dense_like`.
    """
    (chunk,) = opened.model.chunks
    model = build_for_reading(
        run, opened.world, chunk.vocab_size, in_flight=InFlight(runs_again=False), tables=[], access={}
    )
    own = dict(chunk.named_parameters())
    generator = torch.Generator(device=opened.device).manual_seed(1)
    for name, param in model.chunks[0].named_parameters():
        if name in own and param.shape == own[name].shape:
            # One set of numbers for both.
            param.data = own[name].data
        elif param.dim() == 1:
            param.fill_(1.0)
        else:
            param.normal_(0.0, run.model.init_std, generator=generator)
    return model


def dense_like(run: RunConfig, vocab_size: int) -> RunConfig:
    """The same run without memory layers, with feed-forward networks of the width that makes its FLOPs the same."""
    # Experts stay as they are: without blocks of their own they would take those that become free.
    moe = replace(run.moe, layers=run.moe_layers, ffn_hidden_size=run.expert_ffn_hidden_size if run.moe.enabled else 0)
    dense = replace(run, memory=MemoryConfig(enabled=False), more_memories=(), moe=moe)

    def wide(width: int) -> RunConfig:
        return replace(dense, model=replace(dense.model, ffn_hidden_size=width))

    # They grow evenly with the width.
    base = _flops(wide(_WIDTH_STEP), vocab_size)
    steps = (_flops(run, vocab_size) - base) / (_flops(wide(2 * _WIDTH_STEP), vocab_size) - base)
    return wide(_WIDTH_STEP * max(1, 1 + round(steps)))


def _flops(run: RunConfig, vocab_size: int) -> int:
    return model_size(run, vocab_size).flops_per_token


def _in_turn(memory: Forward, dense: Forward, tokens: Tensor, prompt: int) -> list[Speeds]:
    """Measure both models on the same tokens, `[b, s]`, of which the first `prompt` are read at once."""
    seconds: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    # Finds nothing in caches and compiles kernels: does not count.
    for forward in (memory, dense):
        _seconds(forward, tokens, prompt)
    started = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        # Who comes first changes from round to round.
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which].append(_seconds((memory, dense)[which], tokens, prompt))
        if number + 1 >= _LEAST_ROUNDS and time.perf_counter() - started > _SECONDS:
            break
    counts = {"prefill": prompt, "decode": tokens.shape[1] - prompt}
    return [
        Speeds(
            phase=phase,
            batch_size=len(tokens),
            tokens=count,
            memory_seconds=[each[place] for each in seconds[0]],
            dense_seconds=[each[place] for each in seconds[1]],
        )
        for place, (phase, count) in enumerate(counts.items())
    ]


def _seconds(forward: Forward, tokens: Tensor, prompt: int) -> tuple[float, float]:
    """Seconds of reading the prompt, and of the tokens behind it one by one."""
    cache = forward.new_cache(*tokens.shape)
    started = _now(forward.device)
    forward.logits(tokens[:, :prompt], cache, last_only=True)
    read = _now(forward.device)
    for place in range(prompt, tokens.shape[1]):
        forward.logits(tokens[:, place : place + 1], cache, last_only=True)
    return read - started, _now(forward.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
