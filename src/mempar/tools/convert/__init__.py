"""`mempar convert`: a checkpoint in another layout or another format, streamed on one machine.

source       tensors of a model, wherever they come from: read in parts, or row by row
  checkpoint_source   a checkpoint of mempar's
  hf, deepspeed       what other tools wrote
  selection           the weights of another source, in its precision or another one
  with_memory         another source, with memory layers
plan         what has to be done, as jobs that are each done whole or done again
  to_mempar           a checkpoint of mempar's, in the layout that layout.py reads
  hf, deepspeed       what other tools read
formats      which of these a conversion is of
conversion   carries a plan out, with a journal, and gives the whole its name
command      what the command line asks for
"""
