"""Lags and synchrony of a planted output: momentum, common peaks, and what has neither."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import planting
import pytest
from scipy.signal import lfilter

import lcray
from lcray.analyses.lags import lag_profiles, lags
from lcray.analyses.synchrony import coincidences, peaks_of_learning, synchrony
from lcray.errors import InapplicableError, UsageError
from lcray.statistics.coincidence import pairwise_coincidences
from lcray.tables.reading.results import Results
from lcray.tasks.layer import Layer

T = 240
LAYERS = tuple(Layer(name, "", "parameter", (2,), 0, True) for name in ("slow", "plain", "alone"))
TOGETHER = list(range(5, T, 24))  # `slow` and `plain` learn most at these intervals
BETA = 0.8


def make_world() -> planting.World:
    world = planting.make_world(
        spans=(tuple(range(101)), tuple(range(100, T + 1))),
        window=120,
        layers=LAYERS,
        tables=("intervals", "layers", "groups", "traces"),
    )
    random = np.random.default_rng(0)
    noise = random.normal(size=(T + 1, 2))
    force = lfilter([1.0], [1.0, -0.9], noise, axis=0)
    for layer in LAYERS:
        moved = {"slow": lfilter([1.0], [1.0, -BETA], force, axis=0), "plain": force}
        move = moved.get(layer.name, np.zeros((T + 1, 2)))[:T] * 1e-2
        world.move[layer.name] = move
        world.weight[layer.name] = np.cumsum(np.vstack([np.ones((1, 2)), move]), axis=0)
        for split in ("val", "train"):
            world.gradient[split, layer.name] = -force
            lc = random.normal(size=(T, 2)) * 1e-3
            if layer.name != "alone":
                lc[TOGETHER] = -2e-2 * (1 + random.random((len(TOGETHER), 2)))
            world.lc[split, layer.name] = lc
    return world


WORLD = make_world()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return lcray.open(planting.write_reduced(tmp_path_factory.mktemp("together") / "out", WORLD))


def test_the_planted_lag(results: Results) -> None:
    rows = lags(results, max_lag=12).to_pylist()
    assert {(r["layer"], r["window"]) for r in rows} == {
        (layer, window) for layer in ("slow", "plain") for window in ("run", "0:120", "120:240")
    }  # the third layer does not move
    # Σ_j β^j ρ^|τ−j| is greatest at 2 for β = 0.8 and ρ = 0.9
    j = np.arange(500)
    profile = [(BETA**j * 0.9 ** np.abs(tau - j)).sum() for tau in range(-12, 13)]
    planted = int(np.argmax(profile)) - 12
    assert planted == 2
    for row in rows:
        if row["layer"] == "plain":
            assert (row["lag"], row["lag_low"], row["lag_high"]) == (0, 0, 0)
            assert row["correlation"] == row["correlation_0"] > 0.9
        elif row["window"] == "run":
            assert row["lag_low"] <= planted <= row["lag_high"]
            assert abs(row["lag"] - planted) <= 1
            assert row["correlation"] > row["correlation_0"]
            assert row["p_value"] < 0.01
    shape = {(r["n_elements"], r["n_intervals"]) for r in rows if r["window"] == "run"}
    assert shape == {(2, T - 24)}


def test_profiles_have_their_peak_at_the_lag(results: Results) -> None:
    profiles = lag_profiles(results, max_lag=12).to_pylist()
    for row in lags(results, max_lag=12).to_pylist():
        if row["window"] == "run":
            mine = [p for p in profiles if (p["split"], p["layer"]) == (row["split"], row["layer"])]
            assert [p["lag"] for p in mine] == list(range(-12, 13))
            best = max(mine, key=lambda p: p["correlation"])
            assert (best["lag"], best["correlation"]) == (row["lag"], row["correlation"])
            assert best["correlation_high"] == row["correlation_high"]


def test_a_run_too_short_for_lags_says_so(tmp_path: Path) -> None:
    out = planting.write_reduced(tmp_path, planting.make_world())
    for finding in (lags, lag_profiles):
        with pytest.raises(InapplicableError, match="analyze more intervals"):
            finding(lcray.open(out))


def local_minima(lc: np.ndarray, count: int) -> list[int]:
    """By a plain loop."""
    found = [t for t in range(1, len(lc) - 1) if lc[t] < min(lc[t - 1], lc[t + 1], 0.0)]
    return sorted(sorted(found, key=lambda t: lc[t])[:count])


def series(split: str, kind: str, group: int | None) -> dict[str, np.ndarray]:
    """What was planted: groups as `planting.groups` makes them."""
    own = {la.name: WORLD.lc[split, la.name].sum(axis=1) for la in LAYERS}
    first = {la.name: np.sin(np.arange(T) + la.numel) * 1e-3 for la in LAYERS}
    low, high = planting.SHARES
    parts = {3: first, 7: {name: (own[name] - low * first[name]) / high for name in own}}
    if kind == "group":
        return {str(g): np.sum([*part.values()], axis=0) for g, part in parts.items()}
    return own if group is None else parts[group]


BUNDLES = [("layer", None), ("group", None), ("layer", 3), ("layer", 7)]


def test_peaks_are_those_of_a_plain_loop(results: Results) -> None:
    found: dict[Any, list[int]] = {}
    for row in peaks_of_learning(results).to_pylist():
        key = row["split"], row["kind"], row["group"], row["series"]
        found.setdefault(key, []).append(row["start_step"])
        planted = series(*key[:3])[row["series"]]
        assert row["lc"] == pytest.approx(planted[row["start_step"]], rel=1e-9)
    expected = {
        (split, kind, group, name): local_minima(lc, 20)
        for split in ("val", "train")
        for kind, group in BUNDLES
        for name, lc in series(split, kind, group).items()
    }
    assert found == expected


def test_planted_peaks_are_synchronous_and_others_are_not(results: Results) -> None:
    rows = synchrony(results, count=10, permutations=399).to_pylist()
    assert [(r["kind"], r["group"]) for r in rows[::3]] == BUNDLES * 2
    assert [r["window"] for r in rows[:3]] == ["run", "0:120", "120:240"]
    run = rows[0]
    assert (run["n_series"], run["n_peaks"]) == (3, 30)
    assert run["block"] == 12
    assert run["coincidences"] >= len(TOGETHER)
    assert run["p_value"] == 1 / 400
    matrix = {
        (r["a"], r["b"]): r
        for r in coincidences(results, count=10).to_pylist()
        if (r["split"], r["kind"], r["group"]) == ("val", "layer", None)
    }
    assert set(matrix) == set(itertools.product((la.name for la in LAYERS), repeat=2))
    assert matrix["slow", "plain"]["coincidences"] == len(TOGETHER)
    assert matrix["slow", "plain"]["p_value"] < 1e-6
    assert matrix["plain", "alone"]["p_adjusted"] > 0.05
    assert matrix["plain", "slow"] == matrix["slow", "plain"] | {"a": "plain", "b": "slow"}
    assert matrix["alone", "alone"]["coincidences"] == 10
    assert matrix["alone", "alone"]["p_value"] is None
    pairs = [matrix[a, b] for a, b in itertools.combinations((la.name for la in LAYERS), 2)]
    assert run["expected"] == pytest.approx(sum(p["expected"] for p in pairs))
    # Benjamini & Hochberg: the smallest of three p-values counts thrice
    least = min(pairs, key=lambda p: p["p_value"])
    assert least["p_adjusted"] == pytest.approx(3 * least["p_value"])


def test_the_matrix_counts_what_the_peaks_say(results: Results) -> None:
    planted = series("train", "layer", 7)
    flags = np.zeros((T, 3), bool)
    for k, lc in enumerate(planted.values()):
        flags[local_minima(lc, 20), k] = True
    expected = pairwise_coincidences(flags, block=30)
    rows = [
        r
        for r in coincidences(results, block=30).to_pylist()
        if (r["split"], r["group"]) == ("train", 7) and r["a"] < r["b"]
    ]
    assert sorted(r["coincidences"] for r in rows) == sorted(expected.observed.tolist())
    assert sorted(r["p_value"] for r in rows) == pytest.approx(sorted(expected.p_value))


def test_what_cannot_be_asked_for(results: Results) -> None:
    for options in ({"count": 0}, {"distance": 0}, {"block": 0}, {"permutations": 0}):
        with pytest.raises(UsageError, match="must be at least 1"):
            synchrony(results, **options)
    with pytest.raises(UsageError, match="prominence 0: must be above 0"):
        synchrony(results, prominence=0.0)


def test_intervals_without_lc_are_no_place_for_peaks(tmp_path: Path) -> None:
    """Independent series, known at the same half of the intervals: what they share is not LC."""
    layers, n = {"a": 1, "b": 1, "c": 1, "d": 1}, 600
    totals, pairs = [], []
    for trial in range(30):
        random = np.random.default_rng(trial)
        lc = random.normal(size=(1, n, len(layers)))
        lc[:, np.arange(n) % 40 >= 20] = np.nan
        plan = planting.make_plan(layers, n, n, ("train",))
        counts = np.zeros((*lc.shape, 3), np.int64)
        columns = planting.layer_columns(plan, counts, lc)
        tables = {"intervals": planting.interval_columns(plan, lc.sum(axis=2), lc.sum(axis=2))}
        out = planting.write_tables(tmp_path / str(trial), plan, tables | {"layers": columns})
        found = lcray.open(out)
        totals += synchrony(found, windows={"all": "0:"}, permutations=99)["p_value"].to_pylist()
        pairs += [p for p in coincidences(found)["p_value"].to_pylist() if p is not None]
    assert np.mean(np.array(totals) < 0.1) < 0.3
    assert np.mean(np.array(pairs) < 0.1) < 0.2
