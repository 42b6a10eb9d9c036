"""The command line: run the cases, print a table, write ``bench.json``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from . import (
    checks,
    economy,
    findings,
    growth,
    machine,
    memory,
    recorder,
    report,
    scale,
    speed,
    startup,
    storage,
    tables,
    teams,
    wall,
)
from .suite import Bench, Case, Row, chosen, format_table, save

MODULES = (
    machine,
    speed,
    memory,
    economy,
    recorder,
    storage,
    tables,
    growth,
    scale,
    findings,
    wall,
    teams,
    startup,
    checks,
    report,
)
CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}
CORES = 2


def main() -> int:
    """Parse the command line and run; 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--quick", action="store_true", help="a minute that shows that all works")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--data", default=os.environ.get("LCRAY_DATA"), help="or LCRAY_DATA")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return 0
    if not options.data:
        parser.error("give --data, or set LCRAY_DATA, to the folder of the data files")
    os.environ["LCRAY_DATA"] = str(Path(options.data).resolve())
    try:
        cases = chosen(CASES, options.only)
    except ValueError as error:
        parser.error(str(error))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="lcray-bench-") as folder:
        return run(cases, Bench(Path(folder), options.quick), options.out)


def run(cases: dict[str, Case], bench: Bench, out: Path) -> int:
    """Run `cases` in turn; what there is is saved after each."""
    rows: list[Row] = []
    failed = []
    for name, case in cases.items():
        begin = time.perf_counter()
        try:
            rows += case(bench)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        save(rows, out)
    print(format_table(rows))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
