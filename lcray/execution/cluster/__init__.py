"""Ray: actors with one workspace each, and the loop that hands spans to them.

This is the only package that imports ray. The driver's memory is O(workers + spans) and never holds
tensor data. Actors are stateless between spans, so losing one costs only its current span. When Ray
ends, it also ends the process connected to it. So the driver has a process of its own (`driver`),
and the process that called lcray supervises it (`supervision`).
"""
