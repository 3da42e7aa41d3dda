"""What a run reads: tokenizers, .bin/.idx files and what they say about themselves, samples by number.

tokenizer, encoders, hf_encoder   tokenizers by name; what turns text into tokens   (no torch)
manifest, check                   what prepared data say, whether they fit a run    (no torch)
blend, batch_plan                 which sample is where, by arithmetic              (no torch)
samples                           tokens of sample i, and micro-batches of them
trigram                           the loss of trigram counts, a yardstick
"""
