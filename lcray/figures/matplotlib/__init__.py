"""The figures of an output as Matplotlib axes; `lcray.plots` is their public face."""
