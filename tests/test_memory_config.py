"""Settings of the memory layers: what is refused, and how it is said."""

import math

import pytest

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.schedule import lr_factor, lr_factors
from toy import toy_run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "peers"}, r"memory\.variant=peers.*memory, memory_plus"),
        ({"optimizer": "sgd"}, r"memory\.optimizer=sgd.*adamw, row_adam, row_adagrad"),
        ({"dtype": "fp8"}, r"memory\.dtype=fp8 .*float32, bf16"),
        ({"rounding": "up"}, r"memory\.rounding=up .*master, stochastic, nearest"),
        ({"moments_dtype": "float64"}, r"memory\.moments_dtype=float64 .*float32, bf16"),
        ({"moments_dtype": "bf16", "optimizer": "adamw"}, r"memory\.moments_dtype=bf16 .*optimizer=adamw"),
        ({"moments_dtype": "bf16", "optimizer": "row_adagrad"}, r"memory\.moments_dtype=bf16 .*row_adagrad"),
        ({"clip": "both"}, r"memory\.clip=both .*own, joint"),
        ({"lr_multiplier": 0.0}, r"memory\.lr_multiplier=0\.0 "),
        ({"deposit_bytes": -1}, r"memory\.deposit_bytes=-1 "),
        ({"num_subkeys": 0}, r"memory\.num_subkeys=0 "),
        ({"heads": -1}, r"memory\.heads=-1 "),
        ({"top_k": 0}, r"memory\.top_k=0 "),
        ({"key_dim": 0}, r"memory\.key_dim=0 "),
        ({"column_tile": 0}, r"memory\.column_tile=0 "),
        ({"key_dim": 7}, r"memory\.key_dim=7 "),
        ({"top_k": 9, "num_subkeys": 8}, r"memory\.top_k=9 .*memory\.num_subkeys=8"),
        ({"layers": (4, 2)}, r"memory\.layers=\[4, 2\]"),
        ({"layers": (2, 2)}, r"memory\.layers=\[2, 2\]"),
        ({"value_dim": -8}, r"memory\.value_dim=-8 "),
        ({"lr": -0.5}, r"memory\.lr=-0\.5 "),
        ({"clip_grad": -1.0}, r"memory\.clip_grad=-1\.0 "),
    ],
)
def test_memory_config_refuses_with_the_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**settings)


@pytest.mark.parametrize("name", ["lr", "lr_multiplier", "clip_grad", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_config_refuses_numbers_that_are_not_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.{name}={value}"):
        MemoryConfig(**{name: value})


def test_memory_config_takes_the_bounds_of_its_rules() -> None:
    config = MemoryConfig(num_subkeys=8, top_k=8, heads=1, key_dim=2, layers=(0, 1, 7), column_tile=1)
    assert (config.num_slots, config.half_key_dim) == (64, 1)


def test_table_follows_the_training_dtype_unless_it_has_its_own() -> None:
    plain = toy_run(dtype="float64")
    assert (plain.table_dtype_of(plain.memory), plain.value_bytes_of(plain.memory)) == ("float64", 8)
    own = toy_run(dtype="float32", memory={"dtype": "bf16"})
    assert (own.table_dtype_of(own.memory), own.value_bytes_of(own.memory)) == ("bf16", 2)
    wider = toy_run(dtype="bf16", memory={"dtype": "float32"})
    assert (wider.table_dtype_of(wider.memory), wider.value_bytes_of(wider.memory)) == ("float32", 4)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_rounding_is_refused_where_nothing_is_rounded(rounding: str) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.rounding={rounding} with a table in float32.*memory\.dtype=bf16"):
        toy_run(memory={"rounding": rounding})
    assert toy_run(dtype="bf16", memory={"rounding": rounding}).memory.rounding == rounding


def test_values_learn_at_a_rate_and_on_a_schedule_of_their_own() -> None:
    run = toy_run(memory={"lr_multiplier": 4.0})
    assert run.values_lr_of(run.memory) == pytest.approx(4 * run.optim.lr)
    own = toy_run(memory={"lr_multiplier": 4.0, "lr": 0.5})
    assert own.values_lr_of(own.memory) == 0.5
    share = lr_factor(run.optim, 50, run.train.steps)
    assert lr_factors(run, 50) == (share, {"memory": share})
    assert 0.4 < lr_factors(run, 50).dense < 0.6
    constant = lr_factors(toy_run(memory={"schedule": "constant"}), 50)
    assert constant == (share, {"memory": 1.0})
    with pytest.raises(ConfigError, match=r"memory\.schedule=step .*linear, cosine, wsd, constant"):
        toy_run(memory={"schedule": "step"})
