"""The files of a span, and the commit of one attempt at it."""
