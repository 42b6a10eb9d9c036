"""The mathematics: a path between checkpoints, quadrature along it, full-batch gradients, LC."""
