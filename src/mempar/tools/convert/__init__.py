"""`mempar convert`: a checkpoint in another layout or another format, streamed on one machine.

source    tensors of a model, wherever they come from: read in parts, or row by row
plan      what has to be done, as jobs that are each done whole or done again
"""
