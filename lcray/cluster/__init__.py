"""Ray: actors that hold a workspace each, and the loop that hands spans to them.

The only package that imports ray. The driver holds O(workers + spans) and never tensor data; actors
are stateless between spans, so that losing one costs the span it was at.
"""

from lcray.cluster.connecting import connection
from lcray.cluster.pool import Pool

__all__ = ["Pool", "connection"]
