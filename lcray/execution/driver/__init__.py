"""The verbs that drive an analysis, and its record and status."""
