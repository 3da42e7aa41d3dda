"""Starting ranks: a rank that refuses or dies ends the run with its status and one message."""

import sys
from pathlib import Path

import pytest

from mempar.errors import MemparError
from mempar.runtime import launch, worker
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import to_yaml


def test_worker_refuses_a_missing_directory_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The parent-death signal is for real ranks: this process must survive its own test.
    monkeypatch.setattr(sys, "platform", "test")
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "none")])
    assert worker.main() == 2
    assert "does not exist" in capsys.readouterr().err


def test_launch_passes_on_that_ranks_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Two ranks find that there is no data: both leave with status 2, one says why.
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()).replace("num_layers: 12", "num_layers: 2x"))
    with pytest.raises(MemparError, match=r"rank \d of 2 ended with status 2") as failure:
        launch.launch_local(tmp_path, 2, None)
    assert failure.value.exit_status == 2
    assert "model.num_layers must be int" in capfd.readouterr().err


def test_launch_names_the_status_of_a_rank_that_died(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MemparError, match="the only rank ended with status 1") as failure:
        launch.launch_local(tmp_path, 1, None)
    assert failure.value.exit_status == 1
