"""`mempar generate`: texts continued by a checkpoint, and how fast that is."""
