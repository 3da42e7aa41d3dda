"""Memory layers: queries, product keys, table shards, their gradients and their optimizers.

Knows nothing of ranks: what lies on other ranks is reached through the `RowReader` protocol.
"""
