"""lcray against the naive loop, two workers against one, and where a worker's time goes.

Three processes take turns on the same two cores, round after round: the naive loop on two threads;
two workers of one thread each; one of the workers alone. Figures are medians over the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from .adapter import worker_environment
from .nets import NETS, Net
from .player import Player, ask_all
from .suite import Bench, Row

Answer = dict[str, float]


@dataclass(frozen=True)
class Round:
    """What the players answered, and the machine's best rate (two processes) next to it."""

    naive: Answer
    pair: Sequence[Answer]
    single: Answer
    peak: float


def rate(answers: Sequence[Answer]) -> float:
    """Gradients a second of players that worked at once."""
    return sum(a["gradients"] for a in answers) / max(a["seconds"] for a in answers)


def rows(case: str, rounds: Sequence[Round], samples: int, flops: float) -> Iterator[Row]:
    """The figures of all rounds; `flops` are those of a sample."""

    def middle(metric: str, unit: str, values: list[float]) -> Row:
        return Row(case, metric, median(values), unit)

    lcray = [rate(r.pair) for r in rounds]
    naive = [rate([r.naive]) for r in rounds]
    single = [rate([r.single]) for r in rounds]
    pairs = [answer for r in rounds for answer in r.pair]
    yield middle("samples_per_second", "1/s", [samples * v for v in lcray])
    yield middle("naive_samples_per_second", "1/s", [samples * v for v in naive])
    yield middle("ratio_to_naive", "ratio", [a / b for a, b in zip(lcray, naive, strict=True)])
    yield middle(
        "two_workers_over_one", "ratio", [a / b for a, b in zip(lcray, single, strict=True)]
    )
    achieved = [samples * v * flops / r.peak for v, r in zip(lcray, rounds, strict=True)]
    yield middle("share_of_peak", "ratio", achieved)
    yield middle("outside_gradients", "ratio", [1 - a["inside"] / a["seconds"] for a in pairs])
    yield Row(case, "peak_memory", max(a["peak_bytes"] for a in pairs) / 2**20, "MiB")
    naive_peak = max(r.naive["peak_bytes"] for r in rounds)
    yield Row(case, "naive_peak_memory", naive_peak / 2**20, "MiB")


def worker(net: Net, bench: Bench, samples: int, intervals: int) -> Player:
    """A worker on two spans of the network's run."""
    return Player(
        "tests.benchmarks.worker:Worker",
        {**worker_environment(), **net.environment(samples)},
        task=net.task,
        run=net.run(bench),
        steps=f"0:{2 * intervals}",
        span_length=intervals,
        options=net.options,
    )


def measure(net: Net, bench: Bench) -> Iterator[Row]:
    """All rounds of one network."""
    samples, intervals = bench.pick(net.samples, 64), bench.pick(net.intervals, 1)
    arguments: dict[str, Any] = {
        "task": net.task,
        "run": net.run(bench),
        "intervals": intervals,
        "batch_size": net.naive_batch,
        "batch_statistics": net.options.get("batch_norm") == "batch",
    }
    plain = {"OMP_NUM_THREADS": None, **net.environment(samples)}
    with (
        Player("tests.benchmarks.naive:Naive", plain, **arguments) as naive,
        worker(net, bench, samples, intervals) as one,
        worker(net, bench, samples, intervals) as two,
    ):
        plan, flops = one.ask("draft"), one.ask("flops")
        ask_all((one, two), "use", plan=plan)
        done = [play(net, naive, one, two) for _ in range(bench.pick(4, 2))]
    yield from rows(net.name, done[1:], samples, flops)  # the first one warms up


def play(net: Net, naive: Player, one: Player, two: Player) -> Round:
    """One round."""
    slow = naive.ask("round")
    one.send("round", index=0)
    two.send("round", index=1)
    pair = [one.receive(), two.receive()]
    single = one.ask("round", index=0)
    return Round(slow, pair, single, sum(ask_all((one, two), "peak", kind=net.hardest)))


CASES = {f"speed/{net.name}": partial(measure, net) for net in NETS}
