"""What ray submit runs on the head: ray submit cluster.yaml analyze.py RUN OUT."""

import sys
from pathlib import Path

import lcray

if __name__ == "__main__":
    run, out = sys.argv[1:]
    code = Path.home() / "lcray-code"  # where cluster.yaml puts it, on every node
    results = lcray.analyze(
        run,
        f"{code}/mytask.py:task",
        out,
        resources=lcray.Resources(address="auto"),  # the cluster that this machine is part of
    )
    print(f"tables: {results.path}/tables/*.parquet")
