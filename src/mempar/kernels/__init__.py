"""The operations that memory layers spend their time in, one folder each.

A folder holds the public operation (`__init__`), a reference written for reading, and a benchmark;
fused implementations join them there. Nothing here knows about ranks, layers or configurations.
"""
