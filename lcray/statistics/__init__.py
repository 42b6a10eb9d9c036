"""Histograms, likelihoods and resampling; only numbers, nothing of LC."""
