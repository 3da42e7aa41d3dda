"""YAML in which a name that comes twice is an error, where YAML's readers take the last."""

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import BaseConstructor


class UniqueNames(BaseConstructor):
    """To be mixed into a loader, before it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Make a mapping of a node; raises YAMLError for a name that is there twice."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is there twice")
        return super().construct_mapping(node, deep)
