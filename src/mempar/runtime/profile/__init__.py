"""Measuring a run from inside its ranks: marks of phases and collectives, and what the links carry at best."""
