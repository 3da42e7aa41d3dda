"""`mempar verify`: is a checkpoint whole, and do two of them hold the same?

Every byte is read and compared with its checksum, and the digest of every tensor is computed again from
what was read; two checkpoints are the same when their tensors' digests are, whatever their layouts.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mempar.errors import CheckpointError, MemparError
from mempar.memory.digest import digest_box
from mempar.runtime.checkpoint.manifest import HISTORY, WEIGHTS, Manifest, NoCheckpointError, Piece, read_manifest
from mempar.runtime.checkpoint.names import canonical, parameter_of_master
from mempar.runtime.checkpoint.reading import Reader
from mempar.runtime.run_dir import RunDir
from mempar.tools.bars import byte_bars

_THREADS = 2
# Differences in a message.
_NUM_NAMED = 5


class VerifyError(MemparError):
    """A checkpoint that is damaged, or two that differ."""

    exit_status = 1


@dataclass(kw_only=True)
class Findings:
    """What reading a checkpoint has shown.

    Attributes:
        damages: one sentence for each damaged piece.
        digests: of every tensor, from what was read.
    """

    damages: list[str] = field(default_factory=list)
    digests: dict[str, int] = field(default_factory=dict)


def verify(checkpoint: Path, other: Path | None, say: Callable[[str], None]) -> None:
    """Read one checkpoint or two, and say what was found.

    Args:
        checkpoint: a directory written by a run, or by `mempar convert`; or a run's own, for its newest.
        other: what to compare it with.
        say: prints a line.

    Raises:
        CheckpointError: when one of them is no checkpoint.
        VerifyError: when something is damaged, or the two differ.
    """
    manifests = [_open(path) for path in (checkpoint, other) if path is not None]
    for manifest in manifests:
        _check(manifest, say)
    if len(manifests) == 1:
        return
    differing = differences(*manifests)
    if differing:
        more = f"; and {len(differing) - _NUM_NAMED} more" if len(differing) > _NUM_NAMED else ""
        raise VerifyError(f"{checkpoint} and {other} differ: {'; '.join(differing[:_NUM_NAMED])}{more}.")
    say("both hold the same weights and the same optimizer state")


def differences(one: Manifest, other: Manifest) -> list[str]:
    """What two checkpoints hold that is not the same: step counts, weights, optimizer state."""
    found = []
    for counter in ("step", "applied_steps"):
        before, after = one.progress.get(counter), other.progress.get(counter)
        if before != after:
            found.append(f"{counter} is {before} and {after}")
    left, right = _compared(one), _compared(other)
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            found.append(f"{name} is only in {(one if name in left else other).root}")
        elif left[name] != right[name]:
            found.append(f"{name} is not the same")
    return found


def examine(manifest: Manifest, advance: Callable[[int], None]) -> Findings:
    """Read a checkpoint whole.

    Args:
        manifest: of the checkpoint.
        advance: is told how many more bytes were read.
    """
    reader, findings = Reader(manifest), Findings()

    def look(place: tuple[str, Piece]) -> tuple[Piece, int, str]:
        path, piece = place
        try:
            if piece.box is None:
                reader.check_piece(path, piece)
                return piece, 0, ""
            box = piece.box
            return (
                piece,
                int(digest_box(canonical(box.name), reader.read_piece(path, piece), box.offset, box.shape)),
                "",
            )
        except CheckpointError as error:
            return piece, 0, str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        for piece, digest, damage in _few_at_a_time(pool, look, list(manifest.pieces())):
            advance(piece.num_bytes)
            if damage:
                findings.damages.append(damage)
            elif piece.box is not None:
                total = findings.digests.get(piece.box.name, 0)
                findings.digests[piece.box.name] = (total + digest) % 2**64
    if not findings.damages:
        for name, record in manifest.tensors.items():
            if findings.digests.get(name) != record.digest:
                findings.damages.append(f"{name} in {manifest.root} has another digest than its manifest says.")
    return findings


def _open(path: Path) -> Manifest:
    """Read a manifest; what is damaged about a checkpoint before its tensors are read is damage, not bad input."""
    with suppress(OSError):
        # A run stands for its newest one; why a path cannot be looked into is said below.
        path = RunDir(path).latest_checkpoint() or path
    try:
        return read_manifest(path)
    except CheckpointError as error:
        if isinstance(error, NoCheckpointError):
            raise
        raise VerifyError(str(error)) from None


def _check(manifest: Manifest, say: Callable[[str], None]) -> None:
    with byte_bars() as begin:
        findings = examine(manifest, begin(manifest.root.name, manifest.num_bytes))
    if findings.damages:
        more = len(findings.damages) - _NUM_NAMED
        rest = [f"and {more} more damages"] if more > 0 else []
        raise VerifyError("\n".join([*findings.damages[:_NUM_NAMED], *rest]))
    kinds = [record.kind for record in manifest.tensors.values()]
    say(
        f"{manifest.root} is whole: step {manifest.step}, {kinds.count(WEIGHTS)} tensors of weights, "
        f"{len(kinds) - kinds.count(WEIGHTS)} of optimizer state and history, {manifest.num_bytes / 2**20:.1f} MiB in "
        f"{len(manifest.files)} files"
    )


def _compared(manifest: Manifest) -> dict[str, int]:
    """Digests by the names under which they are compared.

    A copy of a parameter that is stepped, in the parameter's own precision, says nothing that the parameter does not;
    when rows were read last is watched, and no state.
    """
    compared = {}
    for name, record in manifest.tensors.items():
        parameter = manifest.tensors.get(parameter_of_master(name) or "")
        if record.kind != HISTORY and (parameter is None or parameter.dtype != record.dtype):
            compared[canonical(name)] = record.digest
    return compared


def _few_at_a_time(pool: ThreadPoolExecutor, function: Callable, items: list) -> Iterator[tuple[Piece, int, str]]:
    """`pool.map` that keeps no more results waiting than there are threads, so that little is in memory."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _THREADS:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
