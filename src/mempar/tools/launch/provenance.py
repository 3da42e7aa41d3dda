"""What a run came from: the command, the source with what is not committed, versions, host and time.

It is saved in `launch/` of the run's directory before anything starts, so that a run whose source has moved on since
can be told, and made again:

    command.json        arguments, host, user, time, Python, and of each repository its commit and state
    mempar.diff         what the source tree that mempar is imported from has beside its commit
    here.diff           the same for the current directory's repository, where that is another one
    packages.txt        versions of all installed packages
    profile.yaml        the launch profile with flags, resolved

`git apply mempar.diff` in a checkout of the commit makes the source again; files that git does not know yet are in it,
those that it ignores are not. Variables of the environment are not saved: there are secrets among them.
"""

import dataclasses
import getpass
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mempar
from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file
from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.profile_file import profile_yaml

# More is data and no source.
MAX_DIFF_BYTES, MAX_NEW_FILE_BYTES = 8 << 20, 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceTree:
    """A directory's repository.

    Attributes:
        path: its root, or the directory itself where there is none.
        commit: that is checked out; empty if it is none, or not known.
        note: why something is not known, or not all of the difference was taken; empty otherwise.
        diff: from the commit to the files as they are, for `git apply`.
    """

    path: str
    commit: str = ""
    note: str = ""
    diff: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a run came from.

    Attributes:
        arguments: of the command.
        directory: in which it was given.
        host: on which.
        user: by whom.
        time: when, with its zone.
        python: version and path of the interpreter.
        mempar_version: of the package.
        source: the tree that mempar is imported from.
        here: the current directory's repository, where that is another one.
        packages: `name==version`, sorted.
        profile: the launch profile; None where there is none.
    """

    arguments: tuple[str, ...]
    directory: str
    host: str
    user: str
    time: str
    python: str
    mempar_version: str
    source: SourceTree
    here: SourceTree | None
    packages: tuple[str, ...]
    profile: LaunchProfile | None


def take(
    arguments: Sequence[str], profile: LaunchProfile | None = None, *, directory: Path | None = None
) -> Provenance:
    """Look at what a run comes from; nothing is written, in repositories neither.

    Args:
        arguments: of the command, its name first.
        profile: that it is launched with.
        directory: where the command was given; the current one unless given.
    """
    place = (directory or Path.cwd()).resolve()
    source = source_tree(Path(mempar.__file__).resolve().parent)
    here = source_tree(place)
    return Provenance(
        arguments=tuple(arguments),
        directory=str(place),
        host=socket.gethostname(),
        user=_user(),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        python=f"{platform.python_version()} {sys.executable}",
        mempar_version=mempar.__version__,
        source=source,
        here=here if here.commit and here.path != source.path else None,
        packages=_packages(),
        profile=profile,
    )


def save(provenance: Provenance, directory: Path) -> None:
    """Write it into a directory, which is made; files of an earlier launch are replaced.

    Raises:
        ConfigError: when it cannot be written.
    """
    trees = {"mempar": provenance.source, **({"here": provenance.here} if provenance.here else {})}
    plain = {
        field.name: getattr(provenance, field.name)
        for field in dataclasses.fields(Provenance)
        if field.name not in ("source", "here", "packages", "profile")
    }
    told = {name: {"path": tree.path, "commit": tree.commit, "note": tree.note} for name, tree in trees.items()}
    files = {
        "command.json": f"{json.dumps({**plain, 'repositories': told}, indent=2)}\n".encode(),
        "packages.txt": "".join(f"{package}\n" for package in provenance.packages).encode(),
        **{f"{name}.diff": tree.diff for name, tree in trees.items() if tree.diff},
    }
    if provenance.profile is not None:
        files["profile.yaml"] = profile_yaml(provenance.profile).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in ("mempar.diff", "here.diff", "profile.yaml"):
            if stale not in files:
                (directory / stale).unlink(missing_ok=True)
        for name, content in files.items():
            replace_file(directory / name, content)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}); what a run comes from is saved before it starts; make "
            "room there, or choose another --out."
        ) from None


def source_tree(directory: Path) -> SourceTree:
    """Describe the repository that a directory belongs to."""
    if not shutil.which("git"):
        return SourceTree(path=str(directory), note="there is no git on this machine")
    found = _git(directory, "rev-parse", "--show-toplevel")
    if found.status:
        what = "no git checkout" if "not a git repository" in found.error else f"git does not read it: {found.error}"
        return SourceTree(path=str(directory), note=what)
    root = Path(_line(found))
    if _git(directory, "check-ignore", "--quiet", ".").status == 0:
        # As an environment's site-packages are that lie in somebody's repository.
        return SourceTree(path=str(directory), note=f"ignored by the git checkout {root}")
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if head.status:
        return SourceTree(path=str(root), note="a git checkout without a commit")
    diff, note = _difference(root)
    return SourceTree(path=str(root), commit=_line(head), note=note, diff=diff)


def _difference(root: Path) -> tuple[bytes, str]:
    """All that the files have beside the commit, new files included, and what was left out."""
    new, large = _new_files(root)
    note = f"left out, for their size: {', '.join(large)}" if large else ""
    with tempfile.TemporaryDirectory(prefix="mempar-index-") as scratch:
        # An index of our own, and a place for objects: the repository stays as it is.
        index, objects = (Path(_line(_git_path(root, name))) for name in ("index", "objects"))
        mine = {
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        if index.exists():
            shutil.copy(index, f"{scratch}/index")
        names = b"".join(os.fsencode(name) + b"\0" for name in new)
        from_list = ("--pathspec-from-file=-", "--pathspec-file-nul")
        steps = [_git(root, "--literal-pathspecs", "add", "--intent-to-add", *from_list, environment=mine, given=names)]
        # Whatever the user's own settings make of a diff, this one is for `git apply`.
        plain = ("--binary", "--no-ext-diff", "--no-color", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
        steps += [_git(root, "diff", "HEAD", *plain, environment=mine)]
    failed = [step for step in steps if step.status]
    if failed:
        return b"", f"the difference is not known: {failed[0].error}"
    if len(steps[-1].output) > MAX_DIFF_BYTES:
        return b"", f"the difference has more than the {MAX_DIFF_BYTES} bytes that are kept; commit it"
    return steps[-1].output, note


def _new_files(root: Path) -> tuple[list[str], list[str]]:
    """Files that git neither knows nor ignores: those to take, and those that are too large, with their bytes."""
    new, large = [], []
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z").output
    for name in (os.fsdecode(name) for name in listed.split(b"\0") if name):
        # A repository in the repository is listed as a directory.
        if (root / name).is_file() or (root / name).is_symlink():
            num_bytes = (root / name).lstat().st_size
            if num_bytes > MAX_NEW_FILE_BYTES:
                large.append(f"{name} ({num_bytes} bytes)")
            else:
                new.append(name)
    return new, large


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Of git: its exit status, its output, of which no more is read than is kept, and its messages in one line."""

    status: int
    output: bytes
    error: str


def _git(directory: Path, *arguments: str, environment: dict[str, str] | None = None, given: bytes = b"") -> _Answer:
    command = ["git", "-C", str(directory), *arguments]
    # Git sets variables for hooks and aliases that would lead to another repository.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables = {**kept, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", **(environment or {})}
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as said:
        file.write(given)
        file.seek(0)
        with subprocess.Popen(command, env=variables, stdin=file, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            output = process.stdout.read(MAX_DIFF_BYTES + 1)
            if len(output) > MAX_DIFF_BYTES:
                process.kill()
        said.seek(0)
        error = " ".join(said.read().decode(errors="replace").split())
    status = 0 if len(output) > MAX_DIFF_BYTES else process.returncode
    return _Answer(status=status, output=output, error=error)


def _git_path(root: Path, name: str) -> _Answer:
    return _git(root, "rev-parse", "--path-format=absolute", "--git-path", name)


def _line(answer: _Answer) -> str:
    return os.fsdecode(answer.output.removesuffix(b"\n"))


def _packages() -> tuple[str, ...]:
    found = ((package.metadata["Name"], package.version) for package in importlib.metadata.distributions())
    return tuple(sorted({f"{name}=={version}" for name, version in found if name}, key=str.lower))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
