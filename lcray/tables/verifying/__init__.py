"""What must hold of an output, and checking it."""
