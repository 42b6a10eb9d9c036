"""Shards to tables, with fits."""
