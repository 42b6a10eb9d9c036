"""Choices before the first gradient: the plan, its spans, and their costs."""
