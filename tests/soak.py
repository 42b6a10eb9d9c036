"""Random kills on a cluster of three nodes, for minutes: ``make soak``.

Analysis after analysis under one plan, while workers, drivers and nodes are killed at random; a
driver that was killed, or gave spans up, is started again. The last line is JSON: how many kills,
how many intervals were lost, and whether all tables were those of an undisturbed analysis.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jobs
import scenes

import lcray


@dataclass
class Soak:
    """The cluster, and what has been done to it."""

    cluster: Any
    undisturbed: jobs.Undisturbed
    random: random.Random
    kills: dict[str, int] = field(default_factory=lambda: {"worker": 0, "driver": 0, "node": 0})
    lost: int = 0
    identical: bool = True

    def analyze(self, folder: Path) -> None:
        """One analysis, until it is done."""
        folder.mkdir()
        job = jobs.make_job(folder, self.cluster.address, self.undisturbed)
        driver = job.start()
        while True:
            time.sleep(self.random.uniform(1, 5))
            code = driver.poll()
            if code == 0:
                break
            if code is not None:  # killed, or it gave spans up
                driver.communicate()
                driver = job.start()
            elif job.done():
                self.kill(job, driver)
        driver.communicate()
        self.judge(job)

    def kill(self, job: jobs.Job, driver: Any) -> None:
        """Somebody."""
        luck = self.random.random()
        workers = sorted(job.at_work())
        if luck < 0.08:
            driver.kill()
            self.kills["driver"] += 1
        elif luck < 0.16:
            jobs.replace_node(self.cluster)
            self.kills["node"] += 1
        elif workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)
                self.kills["worker"] += 1

    def judge(self, job: jobs.Job) -> None:
        found = lcray.verify(job.out)
        committed = lcray.status(job.out).intervals_done
        self.lost += self.undisturbed.plan.n_intervals - committed
        same = scenes.tables(job.out) == self.undisturbed.tables
        self.identical &= same and not found.problems
        total = sum(self.kills.values())
        print(f"analysis done after {total} kills {self.kills}: tables same: {same}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="until so many are done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        undisturbed = jobs.analyze_undisturbed(Path(name, "undisturbed"))
        with jobs.three_nodes() as cluster:
            soak = Soak(cluster, undisturbed, random.Random(options.seed))
            number = 0
            while sum(soak.kills.values()) < options.kills:
                soak.analyze(Path(name, f"analysis-{number}"))
                number += 1
    summary = {
        "kills": sum(soak.kills.values()),
        "intervals_lost": soak.lost,
        "tables_identical": soak.identical,
    }
    print(json.dumps(summary))
    return 0 if soak.identical and not soak.lost else 1


if __name__ == "__main__":
    sys.exit(main())
