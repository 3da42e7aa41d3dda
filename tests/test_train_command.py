"""What `mempar train` refuses before it looks at data or starts a rank; what it does then is test_cli.py's."""

from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.tools.train_command import train


def refused(**options: Any) -> str:
    given = {"num_ranks": None, "out": None, "resume": False, "start_from": None, "say": print}
    with pytest.raises(ConfigError) as failure:
        train("smoke", [], **{**given, **options})
    return str(failure.value)


def test_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    assert "--resume and --from exclude each other" in refused(out=tmp_path, resume=True, start_from=tmp_path)
    assert "--resume needs --out DIR" in refused(resume=True)
    assert "--nproc 0 starts no rank" in refused(num_ranks=0)


@pytest.mark.parametrize("resume", [False, True])
def test_directory_with_something_else_is_refused_and_kept(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "exists and is not an empty directory" in refused(out=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "is no checkpoint" in refused(out=tmp_path / "run", start_from=tmp_path / "step_00000010")
    assert not (tmp_path / "run").exists()
