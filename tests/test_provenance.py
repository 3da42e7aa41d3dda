"""What a run came from is saved whole: its source can be made again from commit and difference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mempar
from mempar.errors import ConfigError
from mempar.tools.launch import provenance
from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.profile_file import read_profile
from mempar.tools.launch.provenance import save, source_tree, take


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", *identity, "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A commit of three files, and everything that can be different from it."""
    root = tmp_path / "repository"
    (root / "sub dir").mkdir(parents=True)
    git(root, "init", "--quiet")
    (root / ".gitignore").write_text("*.log\n")
    (root / "changed.py").write_text("one\n")
    (root / "gone.py").write_text("gone\n")
    (root / "binary").write_bytes(bytes(range(256)))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def spoil(root: Path) -> None:
    (root / "changed.py").write_text("one\ntwo\n")
    (root / "gone.py").unlink()
    (root / "binary").write_bytes(bytes(reversed(range(256))))
    (root / "sub dir" / "nëw: [a-z]*.py").write_text("new\n")
    (root / "staged.py").write_text("staged\n")
    git(root, "add", "staged.py")
    (root / "staged.py").write_text("staged, and changed\n")
    (root / "new.bin").write_bytes(b"\0\1\2")
    (root / "link").symlink_to("changed.py")
    (root / "secret.log").write_text("ignored\n")


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if (path.is_file() or path.is_symlink()) and ".git" not in path.relative_to(root).parts
    }


def test_commit_and_difference_make_the_source_again(repository: Path, tmp_path: Path):
    spoil(repository)
    state = git(repository, "status", "--porcelain=v2", "--untracked-files=all")
    index = (repository / ".git" / "index").read_bytes()
    objects = sorted((repository / ".git" / "objects").rglob("*"))
    tree = source_tree(repository / "sub dir")
    assert (tree.path, tree.note) == (str(repository), "")
    assert tree.commit == git(repository, "rev-parse", "HEAD").strip()
    # Nothing in the repository has changed by it.
    assert (repository / ".git" / "index").read_bytes() == index
    assert sorted((repository / ".git" / "objects").rglob("*")) == objects
    assert git(repository, "status", "--porcelain=v2", "--untracked-files=all") == state
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(repository), str(again))
    git(again, "checkout", "--quiet", tree.commit)
    (tmp_path / "diff").write_bytes(tree.diff)
    git(again, "apply", str(tmp_path / "diff"))
    wanted = files_of(repository)
    del wanted["secret.log"]
    assert files_of(again) == wanted


def test_clean_checkout_has_no_difference(repository: Path):
    (repository / "a.log").write_text("ignored\n")
    tree = source_tree(repository)
    assert (tree.diff, tree.note) == (b"", "")


def test_settings_of_the_user_do_not_change_the_difference(repository: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(repository)
    plain = source_tree(repository).diff
    settings = {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false", "diff.renames": "copies"}
    for name, value in settings.items():
        git(repository, "config", name, value)
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert source_tree(repository).diff == plain


def test_large_files_are_named_and_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "MAX_NEW_FILE_BYTES", 1000)
    (repository / "data.bin").write_bytes(bytes(1001))
    (repository / "small.py").write_text("small\n")
    tree = source_tree(repository)
    assert tree.note == "left out, for their size: data.bin (1001 bytes)"
    assert b"small.py" in tree.diff and b"data.bin" not in tree.diff
    monkeypatch.setattr(provenance, "MAX_DIFF_BYTES", 1000)
    (repository / "changed.py").write_text("line\n" * 1000)
    tree = source_tree(repository)
    assert (tree.diff, tree.note) == (b"", "the difference has more than the 1000 bytes that are kept; commit it")
    assert tree.commit


def test_what_is_no_checkout_is_said(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert source_tree(tmp_path).note == "no git checkout"
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    assert source_tree(tmp_path / "empty").note == "a git checkout without a commit"
    inside = repository / "environment.log" / "site-packages"
    inside.mkdir(parents=True)
    assert source_tree(inside).note == f"ignored by the git checkout {repository}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_tree(repository).note == "there is no git on this machine"


def test_everything_is_saved(repository: Path, tmp_path: Path):
    spoil(repository)
    profile = LaunchProfile(env={"A": "1"}, modules=("cuda",))
    taken = take(["mempar", "launch", "smoke"], profile, directory=repository)
    save(taken, tmp_path / "run" / "launch")
    where = tmp_path / "run" / "launch"
    told = json.loads((where / "command.json").read_text())
    assert told["arguments"] == ["mempar", "launch", "smoke"]
    assert told["directory"] == str(repository) and sys.executable in told["python"]
    assert told["mempar_version"] == mempar.__version__
    assert told["repositories"]["here"] == {"path": str(repository), "commit": taken.here.commit, "note": ""}
    assert set(told["repositories"]) == {"mempar", "here"}
    assert (where / "here.diff").read_bytes() == taken.here.diff
    packages = (where / "packages.txt").read_text().splitlines()
    assert packages == sorted(packages, key=str.lower) and any(line.startswith("numpy==") for line in packages)
    assert read_profile(where / "profile.yaml") == profile
    # A later launch leaves nothing of an earlier one.
    save(take(["mempar", "train"], directory=tmp_path), where)
    assert not (where / "here.diff").exists() and not (where / "profile.yaml").exists()
    assert set(json.loads((where / "command.json").read_text())["repositories"]) == {"mempar"}


def test_directory_that_cannot_be_written_is_bad_input(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        save(take(["mempar"], directory=tmp_path), tmp_path / "file" / "launch")
