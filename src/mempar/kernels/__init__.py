"""The operations that memory layers spend their time in, one folder each.

A folder holds the public operation (`__init__`), torch's operators (`native`), Triton's kernels (`fused`), a reference
written for reading and a benchmark. Beside them: which of the two runs (`dispatch`), what operations check of their
arguments (`checks`), bits that are a function of whole numbers (`hashing`), timing (`contest`). Nothing here knows
about ranks, layers or configurations.
"""
