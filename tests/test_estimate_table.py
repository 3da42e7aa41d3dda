"""The estimate as users see it."""

from dataclasses import replace

from mempar.runtime.config import HardwareConfig
from mempar.runtime.estimate import estimate
from mempar.tools.estimate_table import estimate_table
from test_estimate import big
from toy import toy_run


def test_table_has_stages_shares_and_a_verdict() -> None:
    run = big("1.3b", num_subkeys=1024, mp=8, pp=2)
    found = estimate(run, 64)
    text = estimate_table(found, run.hardware.kind)
    assert text.splitlines()[0].startswith("memory of a rank, GiB")
    for words in (
        "stage 0",
        "stage 1",
        "of GPU",
        "weights",
        "table values",
        "reserved (assumed)",
        "held between steps",
    ):
        assert words in text
    share = found.stages[0].total / run.hardware.kind.memory_bytes
    assert f"{share:.1%}" in text
    assert f"{found.stages[1].weights / 2**30:.2f}" in text
    last = text.splitlines()[-1]
    assert last == f"stage {found.worst_stage} needs {found.worst.total / 2**30:.1f} of 140.4 GiB on 64 H200: fits"
    assert max(map(len, text.splitlines())) <= 100


def test_table_says_what_does_not_fit() -> None:
    run = big("8b", num_subkeys=4096, mp=2)
    assert estimate_table(estimate(run, 2), run.hardware.kind).endswith("on 2 H200: does not fit")


def test_table_says_when_little_is_left() -> None:
    memory = {"optimizer": "row_adagrad", "rounding": "stochastic"}
    run = big("1.3b", num_subkeys=8192, mp=8, memory=memory)
    assert estimate_table(estimate(run, 8), run.hardware.kind).endswith("fits barely, fragments may not")


def test_table_of_a_cpu_run_has_bytes_without_shares() -> None:
    run = replace(toy_run(), hardware=HardwareConfig())
    text = estimate_table(estimate(run, 1), None)
    assert "MiB" in text
    assert "%" not in text
    assert "reserved" not in text
