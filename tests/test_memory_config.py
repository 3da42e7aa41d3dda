"""Settings of the memory layers: what is refused, and how it is said."""

import math

import pytest

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "peers"}, r"memory\.variant=peers.*memory, memory_plus"),
        ({"optimizer": "sgd"}, r"memory\.optimizer=sgd.*adamw, row_adam"),
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


@pytest.mark.parametrize("name", ["lr", "clip_grad", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_config_refuses_numbers_that_are_not_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.{name}={value}"):
        MemoryConfig(**{name: value})


def test_memory_config_takes_the_bounds_of_its_rules() -> None:
    config = MemoryConfig(num_subkeys=8, top_k=8, heads=1, key_dim=2, layers=(0, 1, 7), column_tile=1)
    assert (config.num_slots, config.half_key_dim) == (64, 1)
