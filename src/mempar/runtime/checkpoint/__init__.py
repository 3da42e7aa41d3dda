"""Checkpoints: on disk whole or not at all, provable, and readable in any layout.

manifest     what a checkpoint is made of, piece by piece        (no torch)
boxes        parts of logical tensors                            (no torch)
retention    which checkpoints there are, which may go           (no torch)
accept       whether a run can go on from one                    (no torch)
dense        megatron's state as parts of tensors, and back
tables       tables' state as parts of tensors
torch_dist   the dense part on disk, as megatron reads it
shard_file   shards of tables on disk
reading      any part of any tensor from a checkpoint
saving, loading   all of it, by all ranks
"""
