"""Memory parallelism: which rank holds what of a table, and how rows and gradients travel.

Knows nothing of memory layers or models: it moves slots, weights, sums of rows and their gradients.
"""
