"""Fixtures of the clusters that live on one machine."""

from hosts import hosts  # noqa: F401
