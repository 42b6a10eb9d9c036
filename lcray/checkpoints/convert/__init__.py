"""The verb `convert`: checkpoints of other formats become a run."""
