"""Opening an output, and querying its tables."""
