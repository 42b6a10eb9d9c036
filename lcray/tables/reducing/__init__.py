"""Merging shards into tables, with fits."""
