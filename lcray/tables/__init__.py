"""The tables: what they hold, and their way from a worker to a reader."""
