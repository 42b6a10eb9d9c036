"""The tables: their columns, and their way from a worker to a reader."""
