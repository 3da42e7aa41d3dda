"""Fixtures of the clusters that live on one machine."""

from slurm_cluster import slurm, slurm_session  # noqa: F401
