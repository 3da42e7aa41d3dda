"""DeepSpeed's universal checkpoints, made and read by `mempar convert`; nothing here imports deepspeed.

    DIR/latest_universal                  what DeepSpeed's `load_checkpoint(DIR)` looks for
    DIR/global_stepN_universal/
      zero/PARAMETER/                     fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt of each parameter, tables too
      zero/optimizer_state.pt             what the states have in common
      mp_rank_00_model_states.pt          counters
      mempar/                             what DeepSpeed has no place for, and the way back

Parameters have megatron's names and whole shapes, as in our checkpoints: a model for DeepSpeed whose parameters have
them too loads the directory at any ZeRO stage and tensor-parallel size.

places.py          which tensor lies where, and how it is cut
tensor_file.py     a tensor in a file as torch.save writes it, in parts
crc.py             its checksum, in parts
files.py           the small files
description.py     our folder in it
to_universal.py    a source to a universal checkpoint
from_universal.py  a universal checkpoint as a source

The format is DeepSpeed 0.19's (deepspeed/checkpoint, Apache-2.0), as its loaders read it.
"""

from mempar.tools.convert.deepspeed.from_universal import DeepSpeedSource, is_universal
from mempar.tools.convert.deepspeed.to_universal import plan_deepspeed

__all__ = ["DeepSpeedSource", "is_universal", "plan_deepspeed"]
