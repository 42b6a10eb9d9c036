"""A task's model as one flat vector, moved from point to point."""
