"""Turn LC into the rows of a span."""
