"""The claims of the paper and its author response, each with what a run says to it.

A claim's criterion is fixed here, in words and in code, and no setting is chosen by its outcome.
[LCA]: Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), and its author response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from common import Network

import lcray
from lcray.analyses.comparison import FEWEST_RUNS
from lcray.analyses.momentum import against_momentum

AGREES, DISAGREES, UNDECIDED, REPORTED = "agrees", "disagrees", "undecided", "reported"
MOST = 0.05  # of p-values that count


@dataclass(frozen=True)
class Reading:
    """What was measured on one network: in words, and whether it agrees."""

    network: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Study:
    """The outputs of one network.

    Attributes:
        network: the network.
        folder: of its runs.
    """

    network: Network
    folder: Path

    def outputs(self, condition: str) -> list[Path]:
        """The outputs of a condition, by seed."""
        return list(self.seeds(condition).values())

    def seeds(self, condition: str) -> dict[int, Path]:
        """The outputs of a condition, each with its seed, ascending."""
        found = self.folder.glob(f"{condition}-*/out/tables/manifest.json")
        seeds = {path.parents[2].name.removeprefix(f"{condition}-"): path for path in found}
        return {int(s): seeds[s].parents[1] for s in sorted(filter(str.isdigit, seeds), key=int)}

    @cached_property
    def findings(self) -> lcray.analyses.findings.Findings | None:
        """Of the first plain run."""
        outs = self.outputs("sgd")
        return lcray.findings(outs[0]) if outs else None

    def rows(self, finding: str, **equal: object) -> pd.DataFrame:
        """Rows of a finding on the training split, over the run; none where it is not there."""
        if self.findings is None or finding not in self.findings:
            return pd.DataFrame()
        frame = self.findings[finding].to_pandas()
        wanted = {"split": "train", "window": "run", **equal}
        for name, value in wanted.items():
            if name in frame:
                frame = frame[frame[name].astype(object) == value]
        return frame

    @cached_property
    def last(self) -> str:
        """The name of the last layer's weight."""
        results = lcray.open(self.outputs("sgd")[0])
        return [la.name for la in results.plan.layers if la.name.endswith(".weight")][-1]


Measure = Callable[[Study], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Claim:
    """A statement, when a measurement agrees with it, and the measurement.

    Attributes:
        title: in short.
        said: what the paper or the author response says.
        criterion: when a reading agrees.
        measure: the readings of a network, each in words with its verdict.
    """

    title: str
    said: str
    criterion: str
    measure: Measure

    def readings(self, studies: Sequence[Study]) -> list[Reading]:
        """What all networks say."""
        return [
            Reading(study.network.title, text, verdict)
            for study in studies
            if study.outputs("sgd")
            for text, verdict in self.measure(study)
        ]


def _within(lc: float, bound: float) -> str:
    """LC of one run, and what its quadrature may be off."""
    return f"{lc:+.4f} " + ("(no bound)" if pd.isna(bound) else f"± {bound:.4f}")


def _span(low: float, high: float, form: str) -> str:
    """A confidence interval in parentheses."""
    if pd.isna(low) or pd.isna(high):
        return "(too short a run for an interval)"
    return f"({low:{form}} to {high:{form}})"


def _verdict(yes: bool, no: bool) -> str:
    return AGREES if yes else DISAGREES if no else UNDECIDED


def _helping(study: Study) -> Iterator[tuple[str, str]]:
    for _, row in study.rows("shares", layer="", resolution="run").iterrows():
        low, high = row["helping_of_nonzero_low"], row["helping_of_nonzero_high"]
        share = row["helping_of_nonzero"]
        text = f"{share:.1%} of those that are not zero {_span(low, high, '.1%')}"
        text += f"; {row['helping']:.1%} with zeros"
        yield text, _verdict(low > 0.5 and share < 0.55, high < 0.5 or low > 0.55)


def _habits(study: Study) -> Iterator[tuple[str, str]]:
    for _, row in study.rows("habits", layer="", denominator="nonzero").iterrows():
        mean = row["mean"]
        text = f"{mean:.1%} of the iterations on average, sd {row['sd']:.1%}; "
        yield (
            text + f"{row['near_half']:.0%} of parameters within 45 to 55 %",
            _verdict(0.45 <= mean <= 0.55, not 0.45 <= mean <= 0.55),
        )


def _tails(study: Study) -> Iterator[tuple[str, str]]:
    frame = study.rows("fits", distribution="weibull")
    if len(frame):
        frame = frame[frame["layer"].astype(str).str.endswith(".weight")]
        k, best = frame["shape"], int((frame["rank"] == 1).sum())
        text = f"k from {k.min():.2f} to {k.max():.2f} (median {k.median():.2f}) over layers and "
        text += f"signs; best by AIC in {best} of {len(frame)}; KS distance up to "
        text += f"{frame['ks'].max():.3f}"
        yes = bool((k < 1).all()) and best > len(frame) / 2  # AIC of so many values leaves no doubt
        yield text, _verdict(yes, not yes)


def _oscillation(study: Study) -> Iterator[tuple[str, str]]:
    rates = study.rows("oscillation", layer="", quantity="lc", source="layers")
    frame = study.rows("oscillation", quantity="lc", source="parameters")
    if len(frame) and len(rates):
        net = frame[frame["layer"].astype(str).str.endswith(".weight")]["net"]
        row = rates.iloc[0]
        text = f"LC flips at {row['flip_rate']:.1%} of the steps "
        text += _span(row["flip_rate_low"], row["flip_rate_high"], ".1%")
        text += (
            f"; net progress from {net.min():.1%} to {net.max():.1%} of the distance over layers"
        )
        yes = bool((net < 0.5).all())
        yield text, _verdict(yes, not yes)


HURTING = {
    "resnet20": ("conv.weight", "fc.weight"),
    "allcnn": ("conv9.weight",),
    "vgg": ("fc2.weight", "fc3.weight"),
}


def _hurting(study: Study) -> Iterator[tuple[str, str]]:
    outs = study.outputs("sgd")
    within = len(outs) < FEWEST_RUNS  # then one run decides, by what its quadrature may be off
    seeds = pd.DataFrame() if within else _of_run(lcray.compare(*outs).to_pandas())
    for layer in HURTING.get(study.network.name, ()):
        rows = study.rows("layer_totals", layer=layer) if within else seeds
        for _, row in rows[rows["layer"] == layer].iterrows():
            if within:
                text = f"{_within(row['lc'], row['lc_bound'])} in one run"
                yield f"{layer}: {text}", _verdict(row["hurts"] > 0, row["hurts"] < 0)
            else:
                text = f"{row['lc']:+.4f} {_span(row['lc_low'], row['lc_high'], '+.4f')}"
                text += f" over {row['n']} seeds"
                yield f"{layer}: {text}", _verdict(row["lc_low"] > 0, row["lc_high"] < 0)
    frame = study.rows("layer_totals")
    if len(frame):
        hurts = frame[(frame["hurts"] == 1) & (frame["layer"].astype(str) != "")]
        names = ", ".join(map(str, hurts["layer"])) or "none"
        yield f"layers that hurt in total, beyond their bound: {names}", REPORTED


def _seeds(study: Study) -> Iterator[tuple[str, str]]:
    outs = study.outputs("sgd")
    if len(outs) < 2:
        return
    frame = _of_run(lcray.compare(*outs).to_pandas())
    for _, row in frame[frame["layer"] == study.last].iterrows():
        yield f"{study.last} over {row['n']} seeds: {_estimate(row)}", REPORTED


def _of_run(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["split"] == "train") & (frame["window"] == "run")]


def _estimate(row: pd.Series) -> str:
    text = f"{row['lc']:+.4f} ± {row['lc_se']:.4f}"
    p = row["p_t_adjusted"]
    return text + (f" (p = {p:.2g})" if pd.notna(p) else " (too few seeds for a p-value)")


def _difference(study: Study, condition: str) -> pd.DataFrame:
    """Condition minus plain, by layer, over the seeds that both have outputs of."""
    plain, other = study.seeds("sgd"), study.seeds(condition)
    both = sorted(plain.keys() & other.keys())
    if len(both) < 2:
        return pd.DataFrame()
    against = [plain[seed] for seed in both]
    found = lcray.compare(*(other[seed] for seed in both), against=against, paired=True)
    frame = _of_run(found.to_pandas())
    return frame[(frame["condition"] == "difference") & (frame["layer"] != "")]


def _freezing(condition: str, layer_at: int, sign: int) -> Measure:
    """Whether the other layers' LC goes in the direction of `sign`."""

    def measure(study: Study) -> Iterator[tuple[str, str]]:
        frame = _difference(study, condition)
        if not len(frame):
            return
        modules = list(dict.fromkeys(str(name).rpartition(".")[0] for name in frame["layer"]))
        frame = frame[~frame["layer"].astype(str).str.startswith(modules[layer_at] + ".")]
        frame = frame[frame["layer"].astype(str).str.endswith(".weight")]
        clear = frame[frame["p_t_adjusted"] < MOST]
        along = clear["lc"] * sign > 0
        text = "; ".join(f"{row['layer']}: {_estimate(row)}" for _, row in frame.iterrows())
        yes, no = len(clear) > 0 and bool(along.all()), len(clear) > 0 and not along.any()
        yield f"change of LC: {text}", _verdict(yes, no)

    return measure


def _slow(study: Study) -> Iterator[tuple[str, str]]:
    frame = _difference(study, "slow-last")
    if len(frame):
        frame = frame[frame["layer"].astype(str).str.endswith(".weight")]
        rows = "; ".join(f"{row['layer']}: {_estimate(row)}" for _, row in frame.iterrows())
        yield f"change of LC: {rows}", REPORTED


def _delay(study: Study) -> Iterator[tuple[str, str]]:
    frame = study.rows("lags")
    if not len(frame):
        return
    frame = frame[frame["layer"].astype(str).str.endswith(".weight")].set_index("layer")
    if study.last not in frame.index:
        return
    here, rest = frame.loc[study.last], frame.drop(index=study.last)
    text = (
        f"{study.last}: {here['lag']} intervals {_span(here['lag_low'], here['lag_high'], 'g')}; "
    )
    low, middle, high = (rest["lag"].quantile(q) for q in (0, 0.5, 1))
    text += f"the {len(rest)} others: median {middle:g}, {low:g} to {high:g}"
    text += f"; p = {here['p_value']:.3g} for no correlation at any lag"
    is_there = here["p_value"] < MOST
    yield (
        text,
        _verdict(is_there and here["lag_low"] > middle, is_there and here["lag_high"] <= middle),
    )


def _momentum(study: Study) -> Iterator[tuple[str, str]]:
    pairs = [(study.network.momentum, out) for out in study.outputs("sgd")]
    for folder in sorted(study.folder.glob("momentum-*-*/out/tables/manifest.json")):
        momentum = folder.parents[2].name.split("-")[1]
        pairs.append((float(momentum), folder.parents[1]))
    if len({momentum for momentum, _ in pairs}) < 2:
        return
    frame = against_momentum(pairs).to_pandas()
    frame = frame[(frame["split"] == "train") & (frame["layer"] == study.last)]
    shown = "; ".join(
        f"{row['momentum']:g}: {row['lc']:+.4f} {_span(row['lc_low'], row['lc_high'], '+.4f')}"
        + (f" over {row['n']} seeds" if row["errors"] == "runs" else " in one run")
        for _, row in frame.iterrows()
    )
    seeds = frame[frame["errors"] == "runs"]  # one run says nothing of how seeds differ
    apart = seeds["lc_low"].max() > seeds["lc_high"].min()
    yield f"LC of {study.last} by its momentum: {shown}", _verdict(bool(apart), False)


def _synchrony(kind: str) -> Measure:
    def measure(study: Study) -> Iterator[tuple[str, str]]:
        frame = study.rows("synchrony", kind=kind)
        frame = frame[frame["group"].isna()] if len(frame) else frame
        for _, row in frame.iterrows():
            text = f"{row['coincidences']} coincident peaks of {row['n_series']} {kind}s, "
            text += f"{row['expected']:.1f} expected by chance (p = {row['p_value']:.3g})"
            ratio, p = row["ratio"], row["p_value"]
            yield text, _verdict(p < MOST and ratio > 1, False)

    return measure


def _order(study: Study) -> Iterator[tuple[str, str]]:
    for condition in ("sgd", "adam"):
        for out in study.outputs(condition)[:1]:
            frame = _of_run(lcray.findings(out, only=["first_order"])["first_order"].to_pandas())
            first = frame["rule"] == "first order"
            if first.all() or not first.any():
                continue
            one, used = frame[first].iloc[0], frame[~first].iloc[0]
            text = f"{condition}: gap of first order {one['gap_percent']:+.1f} % of the loss "
            text += f"change, of {used['rule']} {used['gap_percent']:+.2f} %"
            below, close = one["bias"] == -1, abs(used["gap_percent"]) <= 0.3
            yield text, _verdict(below and close, not close or one["bias"] == 1)


def _memorising(study: Study) -> Iterator[tuple[str, str]]:
    for _, row in study.rows("memorising", layer="", train="train", resolution="run").iterrows():
        text = f"{row['lc_train']:+.3f} on train, {row['lc_other']:+.3f} on {row['other']}"
        yield f"{text}; difference {row['difference']:+.3f}", REPORTED


def _fisher(study: Study) -> Iterator[tuple[str, str]]:
    frame = study.rows("fisher")
    if not len(frame) or frame["trace_true"].isna().any():
        return
    frame = frame[frame["layer"].astype(str).str.endswith(".weight")]
    by_lc = frame.loc[frame["lc"].idxmin()]
    by_fisher = frame.loc[frame["trace_true"].idxmax()]
    rank = frame["lc"].rank(ascending=True).corr(frame["trace_true"].rank(ascending=False))
    text = f"most helpful: {by_lc['layer']} ({by_lc['lc_share']:.0%} of LC); most informative: "
    text += f"{by_fisher['layer']} (trace {by_fisher['trace_true']:.3g} ± "
    text += f"{by_fisher['trace_true_se']:.2g}); rank correlation over layers {rank:+.2f}"
    yield text, REPORTED


def _classes(study: Study) -> Iterator[tuple[str, str]]:
    frame = lcray.open(study.outputs("sgd")[0]).sql(
        "SELECT \"group\", sum(lc) AS lc FROM groups WHERE split = 'train' GROUP BY ALL ORDER BY lc"
    )
    if len(frame):
        first, last = frame.iloc[0], frame.iloc[-1]
        text = f"learned most: class {first['group']:.0f} ({first['lc']:+.3f}); least: class "
        yield text + f"{last['group']:.0f} ({last['lc']:+.3f})", REPORTED


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Barely more than half of the parameters help",
        "50.7 % of parameters help at an iteration.",
        "between 50 % and 55 % of the parameters with LC that is not zero, and the confidence "
        "interval above 50 %",
        _helping,
    ),
    Claim(
        "Each parameter helps about half of the time",
        "Each parameter helps at about half of the iterations.",
        "the mean over parameters is between 45 % and 55 %",
        _habits,
    ),
    Claim(
        "Learning is heavy-tailed",
        "LC closely follows a Weibull distribution (k = 0.53 in the example).",
        "k < 1 for every weight layer and sign, and Weibull is the best of four distributions by "
        "AIC for more than half of them",
        _tails,
    ),
    Claim(
        "Most parameters oscillate",
        "Weights and gradients flip, so that LC alternates between helping and hurting.",
        "in every weight layer, the net LC of parameters adds up to less than half of their |LC|",
        _oscillation,
    ),
    Claim(
        "Some layers hurt in total",
        "First and last layer of ResNet, last convolution of AllCNN, the last 2 to 3 fully "
        "connected layers of VGG-like nets.",
        "the confidence interval of the layer's LC over the run is above 0, over seeds from six; "
        "else LC of one run exceeds what its quadrature may be off, which leaves out how seeds "
        "differ",
        _hurting,
    ),
    Claim("Over repeated seeds", "Layers hurt consistently.", "reported", _seeds),
    Claim(
        "Freezing the last layer helps the rest",
        "With the last layer frozen at its initial value, the other layers help more.",
        "every change that is significant (5 %, adjusted) is a decrease of LC, and there is one",
        _freezing("frozen-last", -1, -1),
    ),
    Claim(
        "Freezing the first layer makes others help less",
        "With the first layer frozen, the other layers help less.",
        "every change that is significant (5 %, adjusted) is an increase of LC, and there is one",
        _freezing("frozen-first", 0, 1),
    ),
    Claim(
        "The last layer lags",
        "The last layer's motion lags its gradient because of momentum (phase delay).",
        "its motion follows its gradient at all (5 %, over all lags), and the confidence interval "
        "of the lag is above the median lag of the other layers",
        _delay,
    ),
    Claim(
        "Its momentum shifts its LC",
        "Changing the last layer's momentum changes its LC.",
        "two momenta have confidence intervals over seeds that do not overlap",
        _momentum,
    ),
    Claim(
        "A ten times smaller learning rate of the last layer",
        "Used beside freezing to change what the last layer does.",
        "reported",
        _slow,
    ),
    Claim(
        "Layers learn in synchrony",
        "Layers have their peaks of learning at the same iterations.",
        "more coincident peaks than by chance (5 %), permuted within blocks of iterations",
        _synchrony("layer"),
    ),
    Claim(
        "So do classes",
        "Classes have their peaks of learning at the same iterations.",
        "likewise, over the classes of the data",
        _synchrony("group"),
    ),
    Claim("Class by class", "Classes differ in what is learned of them.", "reported", _classes),
    Claim(
        "First order overestimates, RK4 does not",
        "First order overestimates the decrease of the loss, often by a lot; RK4 is within 0.3 % "
        "of the total loss change on all networks.",
        "first order is below the loss change beyond its error (a negative gap), and the gap of "
        "Simpson's rule within 0.3 %",
        _order,
    ),
    Claim(
        "Learning against memorising",
        "LC on validation data tells generalisation apart from learning.",
        "reported",
        _memorising,
    ),
    Claim(
        "LC against Fisher information",
        "LC and the trace of the Fisher information are different things: the latter changes when "
        "layers are rescaled and the function is not (examples/fisher_rescaling.py).",
        "reported",
        _fisher,
    ),
)
