"""Speed of `mempar prepare` with one worker and with several, in MB of text a second.

    python benchmarks/prepare.py [--workers 2] [--rounds 3] [--megabytes 24] [--out benchmarks/results/prepare-cpu.json]

The text is the built-in corpus (documentation, sources and character names of Python) as JSON lines, plain and
compressed, repeated to the size asked for, without a tokenizer to fetch: a byte-level BPE of 8192 tokens
(`tokenizers`) and a SentencePiece BPE of 4096 are trained on a tenth of it, and the ranks of the first serve
tiktoken. Both sides alternate in one run, each is a command of its own that writes afresh, starting included, and the
ratio is of medians. A pair of measurements during which other processes took more than a twentieth of the cores is
thrown away and measured again. The files of both sides are compared byte by byte. Exits with 1 when a tokenizer gains
less than 1.6.
"""

import argparse
import base64
import gzip
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from mempar.tools.stdlib_corpus import documents

LEAST_SPEEDUP = 1.6
# So that one worker takes about a quarter of a minute for 24 MB: starting takes most of a second.
TIMES_THE_TEXT = {"hf": 2, "hf, gzip": 2, "sentencepiece": 4, "tiktoken": 6, "byte": 16}
PROGRAM = "from mempar.cli import main; main()"
MOST_FOREIGN_SHARE = 0.05
MOST_PAIRS = 100
NUM_CORES = len(os.sched_getaffinity(0))
LIBRARIES = ("tokenizers", "sentencepiece", "tiktoken", "numpy")


def make_tokenizers(folder: Path, texts: list[str]) -> dict[str, str]:
    """Train one tokenizer of every kind; returns their names for --tokenizer."""
    import sentencepiece
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    # The alphabet of a byte-level BPE spells bytes as letters, printable ones as themselves.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    letters |= {chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(plain)))}
    ranks = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    lines = [b"%s %d\n" % (base64.b64encode(bytes(letters[one] for one in token)), rank) for token, rank in ranks]
    (folder / "bpe.tiktoken").write_bytes(b"".join(lines))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=4096,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        input_sentence_size=20000,
        minloglevel=3,
    )
    (folder / "sp.model").write_bytes(model.getvalue())
    return {
        "hf": f"hf:{folder / 'tokenizer.json'}",
        "sentencepiece": f"sentencepiece:{folder / 'sp.model'}",
        "tiktoken": f"tiktoken:{folder / 'bpe.tiktoken'}",
        "byte": "byte",
    }


def busy_seconds() -> tuple[float, float]:
    """Processor seconds so far, of all processes of the machine and of this one with its ended children."""
    counts = [int(count) for count in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    idle = counts[3] + counts[4]
    return (sum(counts) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time() + children.ru_utime + children.ru_stime


def wait_for_quiet() -> None:
    """Return when nobody else has used the machine for a second, or after ten minutes."""
    for _ in range(600):
        before, _ = busy_seconds()
        time.sleep(1)
        if busy_seconds()[0] - before < MOST_FOREIGN_SHARE * NUM_CORES:
            return


def measure(source: Path, tokenizer: str, out: Path, workers: int) -> tuple[float, float]:
    """One preparation from nothing, as a command: its seconds, and the share of the cores that others took."""
    for path in out.parent.glob(f"{out.name}.*"):
        path.unlink()
    arguments = [str(source), "--tokenizer", tokenizer, "--out", str(out), "--workers", str(workers)]
    busy, own = busy_seconds()
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM, "prepare", *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    busy_after, own_after = busy_seconds()
    return seconds, (busy_after - busy - own_after + own) / seconds / NUM_CORES


def compare(source: Path, num_bytes: int, tokenizer: str, workers: int, rounds: int) -> dict[str, Any]:
    """Alternate one worker and several, and compare what they write."""
    outs = {1: source.parent / "one", workers: source.parent / "several"}
    rows: dict[int, list[float]] = {number: [] for number in outs}
    foreign: list[float] = []
    for _ in range(MOST_PAIRS):
        wait_for_quiet()
        pair = {number: measure(source, tokenizer, out, number) for number, out in outs.items()}
        if max(share for _, share in pair.values()) > MOST_FOREIGN_SHARE:
            continue
        for number, (seconds, share) in pair.items():
            rows[number].append(seconds)
            foreign.append(share)
        if len(rows[1]) == rounds:
            break
    else:
        raise SystemExit(f"the machine was never quiet for {rounds} pairs; try again later")
    for suffix in ("bin", "idx"):
        one, several = (Path(f"{out}.{suffix}").read_bytes() for out in outs.values())
        assert one == several, f"{suffix} depends on the number of workers"
    medians = {number: statistics.median(seconds) for number, seconds in rows.items()}
    return {
        "mb_per_s": {f"{number}_workers": num_bytes / 1e6 / seconds for number, seconds in medians.items()},
        "seconds": {f"{number}_workers": sorted(seconds) for number, seconds in rows.items()},
        "largest_share_of_others": max(foreign),
        "speedup": medians[1] / medians[workers],
    }


def main() -> int:
    """Measure, print, save; 1 when more workers gain too little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=24, help="text for the slowest tokenizer; others get more")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = [text.decode() for _, text in documents()]
        names = make_tokenizers(Path(folder), texts[::10])
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        for name, tokenizer in [*names.items(), ("hf, gzip", names["hf"])]:
            content = lines * max(1, round(arguments.megabytes * TIMES_THE_TEXT[name] * 1e6 / len(lines)))
            source = Path(folder) / ("x.jsonl.gz" if "gzip" in name else "x.jsonl")
            source.write_bytes(gzip.compress(content, 6) if "gzip" in name else content)
            found = compare(source, len(content), tokenizer, arguments.workers, arguments.rounds)
            figures[name] = {"megabytes": len(content) / 1e6, **found}
            speeds = ", ".join(f"{speed:.1f} MB/s with {one}" for one, speed in found["mb_per_s"].items())
            print(f"{name}: {speeds}: {found['speedup']:.2f} times as fast", flush=True)
    if arguments.out:
        # Not above: workers import this file, and it brings torch.
        from machine import describe_machine

        versions = {library: metadata.version(library) for library in LIBRARIES}
        machine = {**describe_machine(), **versions, "cores": NUM_CORES}
        arguments.out.write_text(json.dumps({**machine, **figures}, indent=1) + "\n")
    # Bytes need no work worth sharing; they are shown for the speed of reading and writing.
    return int(any(found["speedup"] < LEAST_SPEEDUP for name, found in figures.items() if name != "byte"))


if __name__ == "__main__":
    sys.exit(main())
