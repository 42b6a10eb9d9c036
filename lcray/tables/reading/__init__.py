"""Opening an output, and asking it."""
