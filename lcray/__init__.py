"""Loss change allocation over checkpoints: which parameters learned, when, and by how much."""

__version__ = "0.1.0"
