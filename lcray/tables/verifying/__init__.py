"""The invariants of an output, and their check."""
