"""Carrying out an analysis: what a worker does, the Ray that runs workers, and the verbs."""
