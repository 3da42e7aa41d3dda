"""mempar: a distributed runtime that pretrains language models with memory layers.

A memory layer is a huge trainable key-value table: each token reads a few hundred rows chosen by
product keys, so capacity grows without FLOPs. The rooms, and the one direction in which they
import each other, are described in ARCHITECTURE.md.
"""

__version__ = "0.1.0"
