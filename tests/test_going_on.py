"""Where a launched run goes on from: the newest checkpoint that can be used, or what it was started from."""

from pathlib import Path

import pytest

from mempar.errors import ConfigError, DamagedError, UnreadableError
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import going_on
from mempar.runtime.run_dir import RunDir


def test_damaged_checkpoint_is_passed_over_and_keeps_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunDir(tmp_path)
    for step in (10, 20, 30):
        (paths.checkpoint(step)).mkdir(parents=True)
        (paths.checkpoint(step) / "manifest.json").touch()
    monkeypatch.setattr(going_on, "check_same_data", lambda manifest, run: None)

    def open_it(path: Path, run: RunConfig) -> Path:
        if path.name.endswith("30"):
            raise DamagedError("its manifest is cut short.")
        return path

    monkeypatch.setattr(going_on, "open_checkpoint", open_it)
    said: list[str] = []
    assert going_on.starting_point(paths, RunConfig(), said.append) == paths.checkpoint(20)
    assert said == ["step_00000030 is passed over: its manifest is cut short."]
    # A piece of the next one turns out to be damaged when it is read.
    found = DamagedError("a block has another checksum.")
    told = going_on.pass_over(paths.checkpoint(20), paths, found, writes=True)
    assert told.exit_status == 1
    assert str(told) == f"{found} The next start of this run goes on from step_00000010."
    assert going_on.starting_point(paths, RunConfig(), said.append) == paths.checkpoint(10)
    assert said[-1] == "step_00000020 is passed over: a block has another checksum."
    # There is nothing before the first one, and one of another run is not for this one to pass over.
    assert going_on.pass_over(paths.checkpoint(10), paths, found, writes=True) is found
    assert going_on.pass_over(tmp_path / "elsewhere", paths, found, writes=True) is found


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunDir(tmp_path)
    for step in (10, 20):
        (paths.checkpoint(step)).mkdir(parents=True)
        (paths.checkpoint(step) / "manifest.json").touch()

    def open_it(path: Path, run: RunConfig) -> Path:
        assert path.name.endswith("20")
        raise UnreadableError("it cannot be read (Input/output error).")

    monkeypatch.setattr(going_on, "open_checkpoint", open_it)
    with pytest.raises(UnreadableError, match="Input/output error"):
        going_on.starting_point(paths, RunConfig(), print)


def test_a_run_without_checkpoints_starts_from_where_it_was_to(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    assert going_on.starting_point(paths, RunConfig(), print) is None
    going_on.record_start(paths, Path("/somewhere/step_00000010"))
    assert going_on.starting_point(paths, RunConfig(), print) == Path("/somewhere/step_00000010")
    going_on.record_start(paths, None)
    assert going_on.starting_point(paths, RunConfig(), print) is None
    (paths.launch / "start.json").write_text("{")
    with pytest.raises(ConfigError, match="launch the run anew"):
        going_on.starting_point(paths, RunConfig(), print)
