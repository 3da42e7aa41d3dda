"""`mempar prepare`: text, JSONL and Parquet to Megatron's .bin/.idx.

    inputs       which files there are, and of what format
    streams      files as bytes, decompressed
    reading      batches of about a megabyte of text, in order, each with the place where reading goes on
    documents    a batch as documents, in a worker
    encoding     documents as tokens, in one process or several
    partial      PREFIX.partial/: what is done so far, checked and continued after any interruption
    command      all of it

One process reads, several encode, the first one writes in the order of reading: the files do not depend on how many
there are, and no more than a few batches are in memory. Nothing here imports torch.
"""
