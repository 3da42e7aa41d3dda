"""What `mempar generate` does: a checkpoint and prompts in, their continuations out, word by word."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.generation import generate as continue_prompts
from mempar.runtime.inference.opened import OpenedModel, check_tables, open_model, table_bytes
from mempar.runtime.inference.sampling import Sampling
from mempar.runtime.inference.tokens import encoder_of
from mempar.tools.generate.text_stream import TextStream
from mempar.tools.given_text import check_unicode, read_text

# Why a text ended, in JSON and in words.
_ENDINGS = {
    "end_of_document": "the document ended",
    "context": "the model's context is full",
    "max_tokens": "--max-tokens were generated",
}
# On a terminal these would move its cursor, and worse.
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        checkpoint: a checkpoint or a run.
        prompts: texts to continue.
        prompt_file: a file with one more; `-` is standard input.
        max_tokens: to generate for each.
        temperature: see `Sampling`.
        top_p: see `Sampling`.
        seed: see `Sampling`.
        tables: see `open_model`.
        as_json: whether to print JSON alone.
    """

    checkpoint: Path
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1
    tables: str = "auto"
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A text that was generated: its tokens, the end of the document among them, and what is known of it."""

    prompt: str
    prompt_tokens: int
    tokens: list[int]
    text: str
    ended_by: str
    seconds: float


def generate(request: Request, *, write: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Continue the prompts, one after the other.

    Args:
        request: what was asked for.
        write: prints text as it comes.
        note: prints a line that is not part of a text.

    Raises:
        ConfigError: for prompts, settings or a checkpoint of which nothing can come.
    """
    sampling = Sampling(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
    if request.max_tokens < 1:
        raise ConfigError(f"--max-tokens {request.max_tokens}: there must be something to generate; use 1 or more.")
    tables = check_tables(request.tables)
    prompts = _prompts(request)
    checkpoint = find_checkpoint(request.checkpoint)
    # Before weights are read, which may take minutes.
    manifest = read_manifest(checkpoint)
    run = read_config(manifest)
    encoder = encoder_of(manifest, run)
    tokens = [_encoded(prompt, encoder, run.train.seq_length) for prompt in prompts]
    with open_model(checkpoint, tables=tables) as opened:
        if not request.as_json:
            _say_tables(opened, note)
        found = []
        for prompt, given in zip(prompts, tokens, strict=True):
            show = _shower(write) if not request.as_json else lambda text: None
            show(prompt)
            found.append(_continue(opened, encoder, prompt, given, request.max_tokens, sampling, show))
            show("\n")
            if not request.as_json:
                note(_ending(found[-1]))
        if request.as_json:
            write(json.dumps(_document(opened, request, found), indent=1) + "\n")


def _prompts(request: Request) -> list[str]:
    prompts = list(request.prompts)
    if request.prompt_file is not None:
        path, option = request.prompt_file, f"--prompt-file {request.prompt_file}"
        prompts.append(read_text(None if path == Path("-") else path, option)[0])
    if not prompts:
        raise ConfigError("no prompt is given; a model continues texts; use --prompt TEXT, --prompt-file FILE or both.")
    if "" in prompts:
        raise ConfigError("a prompt is empty; a model continues what it is given; write the beginning of a text.")
    check_unicode("".join(prompts), "a prompt")
    return prompts


def _encoded(prompt: str, encoder: Encoder, context: int) -> list[int]:
    tokens = [int(token) for token in encoder.encode([prompt])[0]]
    start = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
    if not tokens:
        raise ConfigError(f"the prompt {start!r} has no tokens; a model continues at least one; write something else.")
    if len(tokens) >= context:
        raise ConfigError(
            f"the prompt {start!r} has {len(tokens)} tokens; the model was trained on {context} at a time, and one at "
            "least is to follow; use a shorter prompt, or a model of longer sequences (train.seq_length)."
        )
    return tokens


def _continue(
    opened: OpenedModel,
    encoder: Encoder,
    prompt: str,
    given: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    show: Callable[[str], None],
) -> Continuation:
    stream, said = TextStream(encoder, given), []

    def hear(text: str) -> None:
        said.append(text)
        show(text)

    started = time.perf_counter()
    (tokens,) = continue_prompts(
        opened.forward,
        [given],
        max_new_tokens=max_tokens,
        vocab_size=encoder.vocab_size,
        sampling=sampling,
        stop_tokens={encoder.eod},
        on_token=lambda place, token: hear(stream.add(token)),
    )
    seconds = time.perf_counter() - started
    hear(stream.end())
    full = len(given) + len(tokens) == opened.max_length
    ended_by = "end_of_document" if tokens[-1] == encoder.eod else "context" if full else "max_tokens"
    return Continuation(
        prompt=prompt,
        prompt_tokens=len(given),
        tokens=tokens,
        text="".join(said),
        ended_by=ended_by,
        seconds=seconds,
    )


def _shower(write: Callable[[str], None]) -> Callable[[str], None]:
    """How text is shown: on a terminal without what would control it."""
    if not sys.stdout.isatty():
        return write
    return lambda text: write(text.translate(_CONTROL))


def _ending(found: Continuation) -> str:
    count, per_second = len(found.tokens), len(found.tokens) / found.seconds
    return f"[{_ENDINGS[found.ended_by]}: {count} tokens after {found.prompt_tokens}, {per_second:.3g} tokens/s]"


def _say_tables(opened: OpenedModel, note: Callable[[str], None]) -> None:
    if opened.run.memories and opened.tables == "mapped":
        gib = table_bytes(opened.manifest, opened.run) / 2**30
        note(
            f"[tables of {gib:.2f} GiB stay in their files, whose checksums are not "
            "compared: `mempar verify` does that]"
        )


def _document(opened: OpenedModel, request: Request, found: list[Continuation]) -> dict[str, Any]:
    return {
        "checkpoint": str(opened.checkpoint),
        "step": opened.manifest.step,
        "tables": opened.tables if opened.run.memories else None,
        "sampling": {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed},
        "results": [vars(each) for each in found],
    }
