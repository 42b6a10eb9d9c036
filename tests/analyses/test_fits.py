from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import planting
import pytest
from scipy import optimize, stats

import lcray
from lcray.analyses.fits import fits
from lcray.analyses.histogram_arrays import aligned, read_histograms
from lcray.analyses.tidy import notes_of
from lcray.analyses.windows import Window, Windows
from lcray.errors import InapplicableError

T, WIDTH = 80, 8


def planted(shapes: tuple[float, ...], seed: int = 0, spread: float = 0.0) -> dict:
    """LC of layers a, b, … with 60 elements: Weibull, scale 1e-6 times exp(spread·noise_t)."""
    rng = np.random.default_rng(seed)
    scale = 1e-6 * np.exp(spread * rng.normal(size=(T, 1)))
    return {
        ("train", chr(97 + i)): scale * rng.weibull(k, (T, 60)) * rng.choice([-1.0, 1.0], (T, 60))
        for i, k in enumerate(shapes)
    }


def weibull_of(x: np.ndarray) -> tuple[float, float]:
    """The shape, by the textbook's equation 1/k + mean(log x) = Σ x^k log x / Σ x^k, and λ."""
    y = np.log(x)
    k = optimize.brentq(lambda k: 1 / k + y.mean() - np.average(y, weights=x**k), 0.01, 10)
    return k, (x**k).mean() ** (1 / k)


def pick(frame: pd.DataFrame, layer: str, sign: int, window: str = "run") -> pd.DataFrame:
    here = (frame["layer"] == layer) & (frame["sign"] == sign) & (frame["window"] == window)
    return frame[here].set_index("distribution")


@pytest.fixture(scope="module")
def lc() -> dict:
    return planted((0.5, 1.5))


@pytest.fixture(scope="module")
def binned(lc: dict, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = planting.from_elements(tmp_path_factory.mktemp("binned") / "out", lc, window=WIDTH)
    return fits(lcray.open(out), windows={"half": ":40"}).to_pandas()


@pytest.fixture(scope="module")
def exact(lc: dict, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("exact") / "out"
    out = planting.from_elements(path, lc, window=WIDTH, with_elements=True)
    return fits(lcray.open(out), windows={"half": ":40"}).to_pandas()


def test_the_planted_weibull_is_found_in_bins_and_in_values(
    binned: pd.DataFrame, exact: pd.DataFrame
) -> None:
    assert set(binned["source"]) == {"histograms"} and set(exact["source"]) == {"elements"}
    for frame in (binned, exact):
        for layer, k in (("a", 0.5), ("b", 1.5)):
            for sign in (-1, 1):
                weibull = pick(frame, layer, sign).loc["weibull"]
                assert abs(weibull["shape"] - k) < 3.5 * weibull["shape_se"]
                assert abs(weibull["scale"] - 1e-6) < 3.5 * weibull["scale_se"]
                assert weibull["rank"] == 1
                assert weibull["p_value"] > 0.01
                assert pick(frame, layer, sign).loc["exponential"]["p_value"] < 0.02
                # independent values: both errors are of the same thing
                assert 0.5 < weibull["shape_se_blocks"] / weibull["shape_se"] < 1.6


def test_windows_are_of_their_own_values(
    lc: dict, binned: pd.DataFrame, exact: pd.DataFrame
) -> None:
    values = lc["train", "a"][:40]
    values = values[values > 0]
    shape, scale = weibull_of(values)
    twin = stats.weibull_min(shape, scale=scale)
    row = pick(exact, "a", 1, "half").loc["weibull"]
    assert row["n"] == len(values)
    assert row["shape"] == pytest.approx(shape, rel=1e-5)
    assert row["log_likelihood"] == pytest.approx(twin.logpdf(values).sum(), rel=1e-6)
    assert row["ks"] == pytest.approx(stats.kstest(values, twin.cdf).statistic, rel=1e-3)
    assert pick(binned, "a", 1, "half").loc["weibull"]["n"] == len(values)
    assert row["p_value"] != row["p_value"]  # run only


def test_aic_counts_the_parameters_and_ranks(binned: pd.DataFrame, exact: pd.DataFrame) -> None:
    for frame in (binned, exact):
        rows = pick(frame, "b", -1)
        count = pd.Series(2, rows.index).where(rows.index != "exponential", 1)
        assert rows["aic"].tolist() == pytest.approx(
            (2 * count - 2 * rows["log_likelihood"]).tolist(), rel=1e-14
        )
        assert (rows.sort_values("aic")["rank"] == [1, 2, 3, 4]).all()


def test_the_network_is_merged_values_not_merged_parameters(lc: dict, exact: pd.DataFrame) -> None:
    values = np.concatenate([v[v < 0] for v in lc.values()])
    shape, _ = weibull_of(-values)
    assert pick(exact, "", -1).loc["weibull"]["shape"] == pytest.approx(shape, rel=1e-5)


def test_zeros_have_no_part(tmp_path: Path) -> None:
    lc = planted((0.8,))
    lc["train", "a"][:, ::2] = 0
    out = planting.from_elements(tmp_path / "out", lc, window=WIDTH)
    frame = fits(lcray.open(out), replicates=0).to_pandas()
    rows = frame[(frame["window"] == "run") & (frame["layer"] == "a")]
    n = rows[rows["distribution"] == "weibull"]["n"].sum()
    assert n == (lc["train", "a"] != 0).sum()
    assert rows["p_value"].isna().all()


def test_bins_hold_the_values_that_are_between_their_edges(tmp_path: Path) -> None:
    """The first those below all others' edges, zeros none."""
    lc = planted((0.8,))
    lc["train", "a"][:, :9] = 0
    lc["train", "a"][:, 9:20] = 1e-310  # below 2^-1022
    out = planting.from_elements(tmp_path / "out", lc, window=WIDTH)
    found = read_histograms(lcray.open(out), "train", ["a"])
    assert found is not None and found.edges[0] == -np.inf
    for number, sign in enumerate((-1, 1)):
        values = sign * lc["train", "a"]
        expected = np.histogram(values[values > 1e-300], np.exp(found.edges[1:]))[0]
        counts = found.counts[:, 0, number].sum(axis=0)
        assert counts.tolist() == [11 * T * (sign > 0), *expected]
        assert expected.sum() == (values > 1e-300).sum()


@pytest.mark.parametrize("sign", [-1, 1])
def test_distances_are_those_of_scipy(lc: dict, exact: pd.DataFrame, sign: int) -> None:
    values = sign * lc["train", "b"]
    rows = pick(exact, "b", sign)
    for name, family in (("weibull", stats.weibull_min), ("lognormal", stats.lognorm)):
        fitted = family(rows["shape"][name], scale=rows["scale"][name])
        found = stats.kstest(values[values > 0], fitted.cdf)
        assert rows["ks"][name] == pytest.approx(found.statistic, rel=1e-4)


def test_windows_that_cut_base_windows_are_named_and_left_out(tmp_path: Path) -> None:
    out = planting.from_elements(tmp_path / "out", planted((0.8,)), window=WIDTH)
    results = lcray.open(out)
    found = fits(results, windows={"cut": "4:20", "whole": "8:24"}, replicates=0)
    assert set(found["window"].to_pylist()) == {"run", "whole"}
    (note,) = notes_of(found)
    assert "no fits of cut" in note and "multiples of 8" in note
    with pytest.raises(InapplicableError, match="the windows cut histogram windows of 8"):
        aligned(results, Windows((Window("cut", 4, 20),)))


@pytest.mark.slow
@pytest.mark.parametrize("elements", [False, True])
def test_errors_by_blocks_are_those_of_dependent_values(tmp_path: Path, elements: bool) -> None:
    """The scale is shared by all values of an iteration: the truth is that of 40 repetitions."""
    estimates, blocks, naive = [], [], []
    for trial in range(40):
        lc = planted((1.0,), seed=trial, spread=0.5)
        out = planting.from_elements(tmp_path / str(trial), lc, window=2, with_elements=elements)
        frame = fits(lcray.open(out), window=T, replicates=0).to_pandas()
        row = pick(frame, "a", 1).loc["weibull"]
        estimates.append(np.log(row["scale"]))
        blocks.append(row["scale_se_blocks"] / row["scale"])
        naive.append(row["scale_se"] / row["scale"])
    truth = np.std(estimates, ddof=1)
    assert np.mean(naive) < 0.6 * truth
    assert 0.7 * truth < np.mean(blocks) < 1.3 * truth
