"""The tidy data of figures that no finding covers; `lcray.figures` is its public face."""
