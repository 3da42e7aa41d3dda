"""The engine: configuration, bring-up, model, data, optimization, checkpoints and the training loop.

`mcore.py` holds every import of megatron; `model.py` joins the memory and parallel rooms.
"""
