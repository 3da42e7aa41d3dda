"""The message of a run whose named data are missing: the commands for every set, and for those alone."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mempar.cli import app
from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.recipes.data_sets import DATA_SETS, LLAMA2_MIX, LLAMA3_MIX, Mix, commands_of
from mempar.runtime.overrides import override
from mempar.tools.missing_data import check_named_data
from mempar.tools.run_start import with_data

RECIPE = "134m_dense_8xh100_bf16"


def make_pair(prefix: Path) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").touch()


@pytest.fixture
def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a recipe says in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        with_data(find_recipe(RECIPE), print)
    return str(caught.value)


def test_every_missing_set_gets_its_commands(message: str) -> None:
    assert message.startswith("7 of the 7 data sets of 134m_dense_8xh100_bf16 are not there, data/llama2/fineweb.bin")
    for name in LLAMA2_MIX.weights:
        fetch, make = commands_of(name, tokenizer=LLAMA2_MIX.tokenizer, prefix=f"data/llama2/{name}")
        assert f"\n{fetch}\n{make}" in message
    assert (
        "# starcoderdata: 4.5% of the tokens; " in message and "bigcode/starcoderdata first, then `hf auth" in message
    )
    assert "# hf:meta-llama/Llama-2-7b-hf: accept the terms on https://huggingface.co/meta-llama/" in message


def test_sets_that_are_there_get_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = find_recipe(RECIPE)
    for path in run.data.paths[:-2]:
        make_pair(tmp_path / path)
    with pytest.raises(ConfigError, match="2 of the 7 data sets") as caught:
        check_named_data(run)
    assert str(caught.value).count("hf download") == str(caught.value).count("mempar prepare") == 2
    for path in run.data.paths:
        make_pair(tmp_path / path)
    check_named_data(run)


def test_known_names_are_known_elsewhere_and_beside_others(tmp_path: Path) -> None:
    paths = [f"{tmp_path}/elsewhere/c4", f"{tmp_path}/mine"]
    run = override(find_recipe("smoke"), ["data.corpus=", f"data.paths=[{','.join(paths)}]"])
    with pytest.raises(ConfigError) as caught:
        check_named_data(run)
    assert f"mempar prepare data/raw/c4 --tokenizer byte --out {paths[0]} --field text" in str(caught.value)
    assert f"mempar prepare INPUT... --tokenizer byte --out {paths[1]}" in str(caught.value)
    assert "auth login" not in str(caught.value)


def test_unknown_names_alone_are_left_to_the_general_check(tmp_path: Path) -> None:
    run = override(find_recipe("smoke"), ["data.corpus=", f"data.paths=[{tmp_path}/mine]"])
    check_named_data(run)
    with pytest.raises(ConfigError, match=r"mine\.bin does not exist"):
        with_data(run, print)


@pytest.mark.parametrize("mix", [LLAMA2_MIX, LLAMA3_MIX], ids=["llama2", "llama3"])
def test_mixes_have_the_published_shares(mix: Mix) -> None:
    shares = {
        "llama2": {"fineweb": 0.67, "c4": 0.15, "starcoderdata": 0.045, "stackexchange": 0.02},
        "llama3": {"starcoderdata": 0.17, "fineweb2": 0.08},
    }[Path(mix.folder).name]
    assert shares.items() <= mix.weights.items()
    assert sum(mix.weights.values()) == pytest.approx(1.0, abs=1e-12)
    mathematics = ("finemath", "infiwebmath", "open_web_math", "arxiv", "algebraic_stack")
    if mix is LLAMA3_MIX:
        assert sum(mix.weights[name] for name in mathematics) == pytest.approx(0.25)


@pytest.mark.parametrize("name", DATA_SETS)
def test_commands_are_words_that_prepare_takes(name: str) -> None:
    fetch, make = (shlex.split(line) for line in commands_of(name, tokenizer="byte", prefix=f"data/x/{name}"))
    assert fetch[:5] == ["hf", "download", DATA_SETS[name].repository, "--repo-type", "dataset"]
    assert fetch[-1] == make[2] == f"data/raw/{name}"
    # Everything is understood but for the input, which nobody has fetched.
    result = CliRunner().invoke(app, make[1:])
    assert isinstance(result.exception, ConfigError) and f"data/raw/{name} does not exist" in str(result.exception)
