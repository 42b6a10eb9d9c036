"""The Fisher information: squared norms of per-sample gradients."""
