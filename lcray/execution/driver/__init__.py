"""The verbs that drive an analysis, and what they keep of it."""
