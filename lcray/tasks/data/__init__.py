"""A task's data: splits, samples drawn from them, batches and groups."""
