"""Checkpoints of other formats, made into a run: the verb `convert`."""
