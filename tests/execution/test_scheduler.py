"""The scheduler: by itself, event by event; and in a simulation of a large cluster."""

from __future__ import annotations

import heapq
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcray.execution.cluster.scheduler import Assign, Decision, GiveUp, Policy, Replace, Scheduler


def assigned(decisions: list[Decision]) -> list[tuple[object, int]]:
    """(worker, span) of each assignment."""
    return [(d.worker, d.span) for d in decisions if isinstance(d, Assign)]


class TestHandingOut:
    def test_the_worker_that_has_been_free_longest_gets_the_next_span(self) -> None:
        scheduler = Scheduler([1] * 6)
        assert assigned(scheduler.worker_ready("a", 0)) == [("a", 0)]
        assert assigned(scheduler.worker_ready("b", 0)) == [("b", 1)]
        assert assigned(scheduler.span_done("b", 5)) == [("b", 2)]
        assert assigned(scheduler.span_done("a", 6)) == [("a", 3)]

    def test_so_it_is_where_several_are_free(self) -> None:
        scheduler = Scheduler([1] * 2, policy=Policy(backoff=1))
        for worker in "ab":
            scheduler.worker_ready(worker, 0)
        assert scheduler.span_failed("b", "no", 1) == scheduler.span_failed("a", "no", 1.5) == []
        assert scheduler.tick(2) == [Assign("b", 1, 2)]
        assert scheduler.tick(2.5) == [Assign("a", 0, 2)]

    def test_one_span_a_worker_and_none_twice(self) -> None:
        scheduler = Scheduler([1] * 2)
        given = [assigned(scheduler.worker_ready(name, 0)) for name in "abc"]
        assert given == [[("a", 0)], [("b", 1)], []]
        assert set(scheduler.running) == {"a", "b"}

    def test_it_is_finished_when_all_are_done(self) -> None:
        scheduler = Scheduler([1, 1])
        scheduler.worker_ready("a", 0)
        scheduler.span_done("a", 1)
        assert not scheduler.finished
        scheduler.span_done("a", 2)
        assert scheduler.finished
        assert Scheduler([]).finished


class TestFailures:
    def test_a_span_of_a_lost_worker_goes_to_the_next_at_once(self) -> None:
        scheduler = Scheduler([1] * 4)
        scheduler.worker_ready("a", 0)
        assert scheduler.worker_lost("a", "died", 1) == []
        assert scheduler.worker_ready("b", 2) == [Assign("b", 0, 2)]

    def test_a_span_that_fails_waits_and_others_go_first(self) -> None:
        scheduler = Scheduler([1] * 3, policy=Policy(backoff=10))
        scheduler.worker_ready("a", 0)
        assert assigned(scheduler.span_failed("a", "no", 1)) == [("a", 1)]
        assert assigned(scheduler.span_done("a", 2)) == [("a", 2)]
        assert scheduler.span_done("a", 3) == []
        assert scheduler.tick(10.9) == []
        assert scheduler.tick(11) == [Assign("a", 0, 2)]
        assert scheduler.span_failed("a", "no", 12) == []
        assert scheduler.tick(51.9) == []  # four times as long
        assert scheduler.tick(52) == [Assign("a", 0, 3)]

    def test_it_is_given_up_with_its_last_cause_and_costs_only_itself(self) -> None:
        scheduler = Scheduler([1] * 2, policy=Policy(attempts=3, backoff=0))
        scheduler.worker_ready("a", 0)
        scheduler.span_failed("a", "first", 1)
        scheduler.worker_lost("a", "second", 2)
        scheduler.worker_ready("b", 2)
        found = scheduler.span_failed("b", "third", 3)
        assert found[0] == GiveUp(0, "third")
        assert assigned(found) == [("b", 1)]
        scheduler.span_done("b", 4)
        assert scheduler.finished

    def test_what_no_retry_can_help_is_given_up_at_once(self) -> None:
        scheduler = Scheduler([1])
        scheduler.worker_ready("a", 0)
        assert scheduler.span_failed("a", "broken", 1, final=True) == [GiveUp(0, "broken")]
        assert scheduler.finished

    def test_an_idle_worker_that_is_lost_gets_nothing(self) -> None:
        scheduler = Scheduler([1], policy=Policy(backoff=5))
        scheduler.worker_ready("a", 0)
        scheduler.span_failed("a", "no", 0)
        scheduler.worker_lost("a", "died", 1)
        assert scheduler.tick(9) == []


class TestHanging:
    POLICY = Policy(patience=60, slack=20)

    def test_silence_beyond_what_was_expected_is_a_hang(self) -> None:
        scheduler = Scheduler([10, 1], policy=self.POLICY, step_seconds=5)
        scheduler.worker_ready("a", 0)
        scheduler.progress("a", 1, 30)
        assert scheduler.overdue(629) == []  # a step took 30 s: 600 s are allowed from there
        found = scheduler.overdue(631)
        assert found == [Replace("a", "its worker made no progress for 601 s")]
        assert scheduler.worker_ready("b", 640) == [Assign("b", 0, 2)]

    def test_patience_is_the_least(self) -> None:
        scheduler = Scheduler([10], policy=self.POLICY, step_seconds=0.01)
        scheduler.worker_ready("a", 0)
        assert scheduler.overdue(60) == []
        assert scheduler.overdue(60.1) != []

    def test_the_same_news_again_is_no_progress(self) -> None:
        scheduler = Scheduler([10], policy=self.POLICY, step_seconds=1)
        scheduler.worker_ready("a", 0)
        for now in range(1, 61):
            scheduler.progress("a", 1.0, now)
        assert scheduler.overdue(61) == []
        assert scheduler.overdue(61.1) != []

    def test_nobody_is_judged_where_nothing_is_known(self) -> None:
        scheduler = Scheduler([10], policy=self.POLICY)
        scheduler.worker_ready("a", 0)
        assert scheduler.overdue(1e9) == []
        said = Scheduler([10], policy=Policy(patience=60, slack=0))
        said.worker_ready("a", 0)
        assert said.overdue(61) != []

    def test_nor_for_silence_while_nothing_could_be_heard(self) -> None:
        scheduler = Scheduler([10], policy=self.POLICY, step_seconds=1)
        scheduler.worker_ready("a", 0)
        scheduler.forgive(1000)
        assert scheduler.overdue(1059) == []

    def test_a_span_that_hangs_everybody_is_given_up(self) -> None:
        scheduler = Scheduler([1], policy=self.POLICY, step_seconds=1)
        now = 0.0
        for name in "abc":
            scheduler.worker_ready(name, now)
            now += 61
            found = scheduler.overdue(now)
        assert found[-1] == GiveUp(0, "its worker made no progress for 61 s")


class TestStragglers:
    POLICY = Policy(straggling=2, straggling_seconds=20)

    def late(self, attempts: int = 3) -> Scheduler:
        """One of two spans is done, the other one is 50 s late; the worker of the first is idle."""
        policy = replace(self.POLICY, attempts=attempts)
        scheduler = Scheduler([10, 10], policy=policy, seconds=5)
        scheduler.worker_ready("slow", 0)
        scheduler.worker_ready("fast", 0)
        scheduler.span_done("fast", 50)
        return scheduler

    def test_an_idle_worker_gets_a_copy_once_nothing_else_is_left(self) -> None:
        scheduler = self.late()
        assert scheduler.tick(100) == []
        assert scheduler.tick(101) == [Assign("fast", 0, 2)]
        assert scheduler.worker_ready("third", 102) == []  # two are enough
        assert scheduler.tick(500) == []

    def test_whoever_is_second_does_no_harm(self) -> None:
        for first, second in (("slow", "fast"), ("fast", "slow")):
            scheduler = self.late()
            scheduler.tick(101)
            scheduler.span_done(first, 110)
            assert scheduler.finished
            assert scheduler.span_done(second, 120) == []
            assert scheduler.unfinished == 0

    def test_a_copy_that_fails_leaves_the_other_one_at_work(self) -> None:
        scheduler = self.late(attempts=1)  # even where no further try is left
        scheduler.tick(101)
        assert scheduler.worker_lost("fast", "died", 102) == []
        assert not scheduler.finished
        scheduler.span_done("slow", 103)
        assert scheduler.finished

    def test_if_both_fail_it_is_tried_again(self) -> None:
        scheduler = self.late()
        scheduler.tick(101)
        scheduler.worker_lost("fast", "died", 102)
        scheduler.worker_lost("slow", "died", 103)
        assert scheduler.worker_ready("new", 104) == [Assign("new", 0, 3)]

    def test_not_while_there_are_others_to_begin(self) -> None:
        scheduler = Scheduler([10, 10, 10], policy=self.POLICY, seconds=1)
        scheduler.worker_ready("slow", 0)
        scheduler.worker_ready("fast", 0)
        assert assigned(scheduler.span_done("fast", 1000)) == [("fast", 2)]

    def test_not_without_an_idea_of_what_it_should_take(self) -> None:
        scheduler = Scheduler([10], policy=self.POLICY)
        scheduler.worker_ready("slow", 0)
        scheduler.worker_ready("idle", 0)
        assert scheduler.tick(1e6) == []


EVENTS = st.lists(
    st.tuples(st.sampled_from(["ready", "lost", "done", "failed", "tick"]), st.integers(0, 4)),
    max_size=200,
)


@settings(max_examples=200)
@given(n=st.integers(1, 12), events=EVENTS)
def test_whatever_happens_every_span_ends_once_and_no_worker_has_two(
    n: int, events: list[tuple[str, int]]
) -> None:
    policy = Policy(backoff=1, straggling_seconds=0)
    scheduler = Scheduler([1] * n, policy=policy, seconds=0.1)
    present: dict[int, int | None] = {}
    ended: Counter[int] = Counter()
    now = 0.0

    def carry_out(decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Assign):
                assert present[decision.worker] is None
                assert not ended[decision.span]
                present[decision.worker] = decision.span
            elif isinstance(decision, GiveUp):
                ended[decision.span] += 1

    for kind, worker in events:
        now += 1
        if kind == "ready" and worker not in present:
            present[worker] = None
            carry_out(scheduler.worker_ready(worker, now))
        elif kind == "lost" and worker in present:
            del present[worker]
            carry_out(scheduler.worker_lost(worker, "died", now))
        elif kind in ("done", "failed") and present.get(worker) is not None:
            span, present[worker] = present[worker], None
            if kind == "done":
                ended[span] = 1
                carry_out(scheduler.span_done(worker, now))
            else:
                carry_out(scheduler.span_failed(worker, "no", now))
        elif kind == "tick":
            carry_out(scheduler.tick(now))
    held = {worker: span for worker, span in present.items() if span is not None}
    assert {worker: r.span for worker, r in scheduler.running.items()} == held
    assert max(ended.values(), default=0) <= 1
    assert scheduler.unfinished == n - sum(ended.values())
    # With workers that do their work, it comes to an end.
    for worker in range(10, 13):
        present[worker] = None
        carry_out(scheduler.worker_ready(worker, now))
    for _ in range(10 * n + 20):
        now += 100
        for worker, span in list(present.items()):
            if span is not None:
                present[worker] = None
                ended[span] = 1
                carry_out(scheduler.span_done(worker, now))
        carry_out(scheduler.tick(now))
    assert scheduler.finished
    assert len(ended) == n


@dataclass
class Simulation:
    """Workers that take a random time, fail, hang and die, and come back; a clock of its own."""

    spans: int
    workers: int
    seed: int = 1
    died: int = 0
    hung: int = 0
    given_up: list[int] = field(default_factory=list)
    done: Counter[int] = field(default_factory=Counter)
    decisions: int = 0

    def run(self, scheduler: Scheduler, poisonous: int = -1) -> None:
        random_ = random.Random(self.seed)
        events: list[tuple[float, int, str, int, int]] = []
        numbers = iter(range(10**9))

        def later(now: float, kind: str, worker: int, span: int = -1) -> None:
            heapq.heappush(events, (now, next(numbers), kind, worker, span))

        def carry_out(now: float, decisions: list[Decision]) -> None:
            self.decisions += len(decisions)
            for decision in decisions:
                if isinstance(decision, GiveUp):
                    self.given_up.append(decision.span)
                elif isinstance(decision, Replace):
                    gone.add(decision.worker)
                    self.hung += 1
                    later(now + 5, "ready", next(names))
                elif isinstance(decision, Assign):
                    luck = random_.random()
                    takes = random_.expovariate(1) * 10
                    bad = decision.span == poisonous
                    if luck < 0.001:
                        continue  # it hangs
                    kind = "died" if luck < 0.01 or bad else "failed" if luck < 0.02 else "done"
                    later(now + takes, kind, decision.worker, decision.span)

        names, gone = iter(range(10**9)), set()
        for _ in range(self.workers):
            later(random_.random(), "ready", next(names))
        tick = 1.0
        while not scheduler.finished:
            if not events or events[0][0] > tick:
                now = tick
                tick += 1.0
                carry_out(now, scheduler.overdue(now))
                carry_out(now, scheduler.tick(now))
                continue
            now, _, kind, worker, span = heapq.heappop(events)
            if worker in gone:
                continue
            if kind == "ready":
                carry_out(now, scheduler.worker_ready(worker, now))
            elif kind == "died":
                self.died += 1
                later(now + 5, "ready", next(names))
                carry_out(now, scheduler.worker_lost(worker, "died", now))
            elif kind == "failed":
                carry_out(now, scheduler.span_failed(worker, "no", now))
            else:
                self.done[span] += 1
                carry_out(now, scheduler.span_done(worker, now))


def simulate(spans: int, workers: int, poisonous: int = -1) -> tuple[Simulation, float]:
    simulation = Simulation(spans, workers)
    policy = Policy(attempts=5, patience=300)
    scheduler = Scheduler([1] * spans, policy=policy, seconds=10, step_seconds=10)
    start = time.process_time()
    simulation.run(scheduler, poisonous)
    return simulation, time.process_time() - start


def test_two_hundred_workers_that_fail_hang_and_die() -> None:
    found, _ = simulate(20_000, 200, poisonous=123)
    assert found.given_up == [123]
    assert set(found.done) == set(range(20_000)) - {123}
    assert found.died > 100 and found.hung >= 5


@pytest.mark.slow
def test_a_million_spans_on_two_hundred_workers() -> None:
    """Every interval a span of its own: the rate is that of the scheduler and the simulation."""
    found, seconds = simulate(1_000_000, 200)
    assert len(found.done) == 1_000_000
    assert found.decisions / seconds > 1000
    assert found.died > 5000


def per_event(spans: int, workers: int) -> float:
    """CPU seconds of one finished span and the next assignment, in the middle of the work."""
    scheduler = Scheduler([1] * spans, seconds=1.0)
    for worker in range(workers):
        scheduler.worker_ready(worker, 0)
    start = time.process_time()
    for number in range(spans // 2):
        scheduler.span_done(number % workers, number)
    return (time.process_time() - start) / (spans // 2)


def test_the_cost_of_an_event_does_not_grow() -> None:
    """A hundredfold number of spans or of workers: a scan of either would cost far more."""
    small = min(per_event(2_000, 20) for _ in range(3))
    assert min(per_event(200_000, 20) for _ in range(2)) < 10 * small
    assert min(per_event(200_000, 2_000) for _ in range(2)) < 10 * small


def memory() -> Iterator[int]:
    for spans in (10_000, 1_000_000):
        intervals = [1] * spans
        tracemalloc.start()
        scheduler = Scheduler(intervals, seconds=1.0)
        for worker in range(200):
            scheduler.worker_ready(worker, 0)
        for number in range(5_000):
            scheduler.span_done(number % 200, number)
        yield tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def test_memory_is_a_few_bytes_a_span() -> None:
    few, many = memory()
    assert many - few < 4 * 990_000
