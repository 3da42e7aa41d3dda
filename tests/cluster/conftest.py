"""Fixtures of the clusters that live on one machine."""

from hosts import hosts  # noqa: F401
from slurm_cluster import slurm, slurm_session  # noqa: F401
