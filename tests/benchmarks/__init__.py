"""Benchmarks: ``python -m tests.benchmarks`` from the root of the repository, or ``make bench``.

A case is a function from a `Bench` to rows ``case, metric, value, unit``. What is timed runs in
processes of its own, with one thread each, as a worker does; rounds of what is compared take turns,
so that a slow spell of the machine hits all of it. Everything runs on the example networks and the
real data in ``LCRAY_DATA``.
"""
