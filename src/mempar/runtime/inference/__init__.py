"""Using a trained model: opening a checkpoint, logits with and without a cache, sampling, generation.

One engine: the model is the one that training builds, on any layout's checkpoint, without optimizers, gradients or
drawn values; tables may stay in their files.
"""
