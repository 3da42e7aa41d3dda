"""Names that come twice in YAML."""

import pytest
import yaml

from mempar.runtime.unique_names import UniqueNames


class Loader(UniqueNames, yaml.SafeLoader):
    """As those of files are made."""


def test_names_are_taken_once() -> None:
    assert yaml.load("a: 1\nb: {a: 2}\n", Loader=Loader) == {"a": 1, "b": {"a": 2}}


@pytest.mark.parametrize("text", ["a: 1\na: 1\n", "b: {a: 1, c: 2, a: 3}\n"])
def test_name_that_comes_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="a is there twice"):
        yaml.load(text, Loader=Loader)
