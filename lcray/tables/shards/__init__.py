"""The files of a span, and the commit that makes one attempt at it count."""
