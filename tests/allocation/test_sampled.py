"""Simpson's rule with the midpoint on a sample of the batches, against the twin and by counting."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from strategies import Bench, Case, convnet, frozen, mlp, transformer
from torch import Tensor
from twin import Twin

from lcray.allocation.interval import NONFINITE_CHECKPOINT, OK, IntervalLC
from lcray.allocation.path import Segment
from lcray.allocation.quadrature import get_rule
from lcray.allocation.sampled import BatchSample, Sampler, Spread, merged

BLOCK = get_rule("simpson-sampled").block
EXACT = 1e-10  # of Σ|LC|, against the twin


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[BatchSample]:
    """The samples of an allocation, in the order in which they are drawn."""
    found: list[BatchSample] = []
    draw = Sampler.draw

    def spy(self: Sampler, path: Segment, **how: bool) -> BatchSample:
        found.append(draw(self, path, **how))
        return found[-1]

    monkeypatch.setattr(Sampler, "draw", spy)
    return found


def run(case: Case, **options: Any) -> list[IntervalLC]:
    return Bench(case, rule="simpson-sampled", **options).run(case.states)


def cost(result: IntervalLC) -> float:
    return result.n_gradients + result.sampled_gradients


CASES = {
    "groups in order": mlp(3, "tanh", 40, states=4),
    "weights": mlp(4, "gelu", 40, weighted=True, states=4),
    "mixed groups, padding": transformer(5, 30, states=4),
    "moving buffers": convnet(6, "tanh", "running", 60, states=4),
    "frozen": frozen(7, "relu", 40, states=4),
}
SIZES = {"moving buffers": 2}


@pytest.mark.parametrize("name", CASES)
def test_lc_and_its_error_are_those_of_the_twin(name: str, drawn: list[BatchSample]) -> None:
    """Each batch's correction is the twin's Simpson minus its trapezoid, on that batch alone."""
    case = replace(CASES[name], options={})
    bench = Bench(case, rule="simpson-sampled", batch_size=SIZES.get(name, 1), sampling_error=0.5)
    results = bench.run(case.states)
    assert [sample.whole for sample in drawn] == [True, False, False]
    for (before, after), result, sample in zip(
        itertools.pairwise(case.states), results, drawn, strict=True
    ):
        if sample.whole:
            continue
        batches = list(bench.split.batches)
        expected = Expected(case, before, after, batches, bench.split.present, sample.numbers)
        scale = float(result.lc.abs().sum())  # type: ignore[union-attr]
        for layer, found in bench.by_layer(result.lc).items():  # type: ignore[arg-type]
            assert float((found - expected.lc[layer]).abs().max()) <= EXACT * scale, layer
        columns = [layer.name for layer in bench.layers]
        error = torch.tensor([abs(expected.correction[n]) for n in columns], dtype=torch.float64)
        assert float((result.layer_error - error).abs().max()) <= EXACT * scale
        se = np.sqrt([expected.variance[n] for n in (*columns, "")])
        assert np.abs(np.sqrt(sample.spread().variance) - se).max() <= EXACT * scale
        for found, right in zip((*result.layer_se.tolist(), result.lc_se), se, strict=True):  # type: ignore
            assert math.isnan(found) or abs(found - right) <= EXACT * scale
        for number, group in enumerate(bench.split.groups):
            right = torch.tensor([expected.groups[group][n] for n in columns], dtype=torch.float64)
            assert float((result.group_lc[number] - right).abs().max()) <= EXACT * scale
        assert result.converged is None and result.n_gradients == 1


class Expected:
    """The estimate and its variance, written down from the definition, by name of the layer."""

    def __init__(
        self,
        case: Case,
        before: Any,
        after: Any,
        batches: list[Any],
        present: Any,
        numbers: tuple[int, ...],
    ) -> None:
        chunks = [tuple(part[i : i + 1] for part in case.data) for i in range(len(case.data[0]))]
        whole = Twin(case.make, case.loss, chunks, case.groups).interval(before, after, "trapezoid")
        constant = case.groups is not None and all(len(each) == 1 for each in present)
        stratum = [each[0] if constant else 0 for each in present]
        total = math.fsum(whole.group_weights.values()) if case.groups else float(len(chunks))
        self.lc = {n: v.clone() for n, v in whole.lc.items()}
        self.groups = {g: dict(v) for g, v in whole.groups.items()}
        self.correction = dict.fromkeys(whole.lc, 0.0)
        corrections: dict[int, list[dict[str, float]]] = {}
        for number in numbers:
            h = stratum[number]
            expansion = stratum.count(h) / sum(stratum[k] == h for k in numbers)
            samples = len(batches[number][0])
            items = [tuple(part[i : i + 1] for part in batches[number]) for i in range(samples)]
            twin = Twin(case.make, case.loss, items, case.groups)
            try:
                fine, coarse = (
                    twin.interval(before, after, rule) for rule in ("simpson", "trapezoid")
                )
            except ZeroDivisionError:  # a batch without weight has no mean loss
                corrections.setdefault(h, []).append(dict.fromkeys([*self.lc, ""], 0.0))
                continue
            mass = math.fsum(fine.group_weights.values()) if case.groups else float(samples)
            by_layer = {}
            for n in self.lc:
                change = (fine.lc[n] - coarse.lc[n]) * (mass / total)
                self.lc[n] = self.lc[n] + expansion * change
                by_layer[n] = float(change.sum())
                self.correction[n] += expansion * by_layer[n]
                for g, of_group in fine.groups.items():
                    share = fine.group_weights[g] / whole.group_weights[g]
                    more = (of_group[n] - coarse.groups[g][n]) * share
                    self.groups[g][n] += expansion * more
            by_layer[""] = math.fsum(by_layer.values())
            corrections.setdefault(h, []).append(by_layer)
        self.variance = dict.fromkeys([*self.lc, ""], 0.0)
        for h, found in corrections.items():
            size, n_drawn = stratum.count(h), len(found)
            for n in self.variance:
                values = [each[n] for each in found]
                spread = float(np.var(values, ddof=1)) if n_drawn > 1 else 0.0
                self.variance[n] += size**2 * (1 - n_drawn / size) * spread / n_drawn


def test_over_all_samples_the_estimate_is_simpson_and_its_variance_is_right() -> None:
    """Of all pairs of five batches, the mean is Simpson, and the mean variance the true one."""
    case = mlp(1, "tanh", 10, states=2)
    case = replace(case, groups=None, options={"batch_size": 2})
    bench = Bench(case)
    (segment,) = bench.segments(case.states)
    estimates, variances = [], []
    for numbers in itertools.combinations(range(5), 2):
        correction, sample = corrected(bench, segment, numbers)
        estimates.append(correction)
        variances.append(sample.spread().variance[:-1])
    simpson, trapezoid = (
        Bench(case, rule=rule).run(case.states)[0].lc for rule in ("simpson", "trapezoid")
    )
    delta = segment.difference()
    mean = sum(estimates) / len(estimates)
    scale = float(simpson.abs().sum())  # type: ignore[union-attr]
    assert float((delta * mean - (simpson - trapezoid)).abs().max()) <= 1e-12 * scale  # type: ignore
    by_layer = [
        [float((delta[where] * (each - mean)[where]).sum()) for where in bench.flat.slices]
        for each in estimates
    ]
    true = np.mean(np.square(by_layer), axis=0)
    assert np.abs(np.mean(variances, axis=0) / true - 1).max() <= 1e-9


def corrected(
    bench: Bench, segment: Segment, numbers: tuple[int, ...]
) -> tuple[Tensor, BatchSample]:
    strata = np.zeros(len(numbers), np.int64), np.array([len(bench.split.batches)])
    vector = bench.engine.new_vector()
    sample = BatchSample(bench.flat, bench.split, segment, numbers, strata, vector)
    sample.normalize(10.0, ())
    for s in (0.0, 0.5, 1.0):
        segment.set_point(bench.flat, s)
        bench.engine.sum_part(bench.split, numbers, None, (), 1.0, merged(sample.taps(s)))
    return vector * sample.scale, sample


def test_with_all_batches_it_is_simpson_bit_for_bit() -> None:
    case = mlp(2, "gelu", 60, states=BLOCK + 4)
    exact = Bench(case, batch_size=2).run(case.states)
    found = run(case, batch_size=2, sampling_error=1e-9)
    assert all(torch.equal(a.lc, b.lc) for a, b in zip(found, exact, strict=True))  # type: ignore
    assert all(torch.equal(a.group_lc, b.group_lc) for a, b in zip(found, exact, strict=True))  # type: ignore
    assert all(result.lc_se == 0.0 and not result.layer_se.any() for result in found)  # type: ignore
    assert all(result.n_gradients == 2 for result in found)


def test_few_batches_are_all_taken_and_cost_no_more_than_simpson() -> None:
    case = mlp(2, "gelu", 24, states=6)
    assert [cost(result) for result in run(case, batch_size=2)] == [2.0] * 5


def test_each_block_begins_with_all_batches() -> None:
    """The second interval pays for its sample at its start, which was not known there before."""
    case = replace(mlp(2, "tanh", 100, states=2 * BLOCK + 4), groups=None)
    costs = [cost(result) for result in run(case, batch_size=1, sampling_error=10.0)]
    assert costs == ([2.0, 1.24] + [1.12] * (BLOCK - 2)) * 2 + [2.0, 1.24, 1.12]


def test_blocks_stand_alone() -> None:
    """So spans, which are whole blocks, do not matter; nor what comes later."""
    case = mlp(8, "relu", 90, states=2 * BLOCK + 3)
    options = {"batch_size": 1, "sampling_error": 0.02}
    whole = run(case, **options)
    parts = [
        *run(replace(case, states=case.states[: BLOCK + 1]), **options),
        *relabelled(case, BLOCK, options),
    ]
    assert {cost(result) for result in whole} > {2.0}
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.lc, b.lc) and torch.equal(a.group_lc, b.group_lc)  # type: ignore
        assert torch.equal(a.layer_se, b.layer_se) or (  # type: ignore[arg-type]
            torch.equal(a.layer_se.nan_to_num(-1.0), b.layer_se.nan_to_num(-1.0))  # type: ignore
        )
        assert cost(a) == cost(b)


def relabelled(case: Case, first: int, options: dict[str, Any]) -> list[IntervalLC]:
    """The intervals from `first` on, by their steps in the run: these seed the samples."""
    bench = Bench(case, rule="simpson-sampled", **options)
    points = [bench.point(state, first + k) for k, state in enumerate(case.states[first:])]
    segments = [Segment(a, b) for a, b in itertools.pairwise(points)]
    allocator = bench.allocator()
    found = []
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        result = allocator.advance(segment, lambda following=following: following)  # type: ignore
        found.append(replace(result, lc=result.lc.clone()))  # type: ignore[union-attr]
    return found


def test_the_size_of_a_sample_follows_from_earlier_intervals_alone(
    drawn: list[BatchSample],
) -> None:
    case = replace(mlp(9, "tanh", 100, states=8), groups=None)
    run(case, batch_size=1, sampling_error=0.02)
    before = [sample.numbers for sample in drawn]
    drawn.clear()
    wild = {name: value + 2.0 for name, value in case.states[6].items()}
    run(replace(case, states=(*case.states[:6], wild, case.states[7])), batch_size=1,
        sampling_error=0.02)  # fmt: skip
    assert [sample.numbers for sample in drawn][:6] == before[:6]  # the wild end is of interval 5
    assert len({len(numbers) for numbers in before}) > 2  # they do adapt


def test_the_seed_and_the_step_decide_what_is_drawn(drawn: list[BatchSample]) -> None:
    case = replace(mlp(9, "tanh", 100, states=6), groups=None)
    for seed in (0, 0, 1):
        run(case, batch_size=1, sampling_error=10.0, sample_seed=seed)
    numbers = [sample.numbers for sample in drawn]
    assert numbers[:5] == numbers[5:10]
    assert all(a != b for a, b in zip(numbers[1:5], numbers[11:], strict=True))
    assert len(set(numbers[1:5])) == 4


def test_after_a_checkpoint_that_is_not_finite_all_is_as_in_a_block_without_it() -> None:
    case = replace(mlp(9, "tanh", 100, states=8), groups=None)
    broken = {name: value * math.nan for name, value in case.states[3].items()}
    states = (*case.states[:3], broken, *case.states[4:])
    found = run(replace(case, states=states), batch_size=1, sampling_error=10.0)
    assert [r.status for r in found] == [OK, OK, *[NONFINITE_CHECKPOINT] * 2, OK, OK, OK]
    assert [cost(r) for r in found] == [2.0, 1.24, 0.0, 0.0, 1.12, 1.12, 1.12]
    first = run(replace(case, states=(broken, *case.states[1:])), batch_size=1, sampling_error=10.0)
    assert [cost(r) for r in first][:4] == [0.0, 2.0, 1.24, 1.12]  # the first that shows the spread


def test_where_few_batches_make_up_the_spread_there_is_no_standard_error() -> None:
    """One item of a hundred moves the loss: a sample says little, with it or without it."""
    case = replace(mlp(9, "tanh", 100, weighted=True, states=6), groups=None)
    inputs, targets, weights = case.data
    heavy = torch.full_like(weights, 1e-6)
    heavy[7] = 1.0
    options = {"batch_size": 1, "sampling_error": 10.0}
    results = run(replace(case, data=(inputs, targets, heavy)), **options)
    assert results[0].lc_se == 0.0
    assert all(math.isnan(result.lc_se) for result in results[1:])  # type: ignore[arg-type]
    assert all(result.layer_se.isnan().all() for result in results[1:])  # type: ignore[union-attr]


def test_kurtosis_is_that_about_the_means_of_the_strata() -> None:
    """Two strata of two and four batches; -1 and 1 about any mean have kurtosis 1."""
    values = np.array([[4.0, 1.0], [6.0, 1.0], [-1.0, 2.0], [1.0, 2.0], [-1.0, 2.0], [1.0, 2.0]])
    spread = Spread.of(values, np.array([0, 0, 1, 1, 1, 1]), np.array([3, 8]))
    assert spread.kurtosis.tolist() == [1.0, 0.0]
    # s² = 2 and 4/3: 3·(3-2)/2·2 + 8·(8-4)/4·4/3, and 3·2 + 8·4/3
    assert spread.variance == pytest.approx([3 + 32 / 3, 0], rel=1e-15)
    assert spread.need == pytest.approx([6 + 32 / 3, 0], rel=1e-15)


def test_a_streamed_split_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp(8, "relu", 90, states=6)
    options = {"batch_size": 2, "sampling_error": 0.05}
    resident = run(case, **options)
    bench = Bench(case, rule="simpson-sampled", **options)
    (source,) = bench.work.sources
    bench.split = source.cut(2, place=lambda tensor: tensor, resident_bytes=0)
    assert not bench.split.batches.resident
    for a, b in zip(resident, bench.run(case.states), strict=True):
        assert torch.equal(a.lc, b.lc)  # type: ignore[arg-type]
