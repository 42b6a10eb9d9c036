"""From LC to the rows of a span."""
