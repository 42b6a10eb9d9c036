"""The page of results: per claim, what was said, what was measured, and whether it agrees.

Run:  python examples/paper/page.py --scale small --out paper > paper.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from claims import AGREES, CLAIMS, DISAGREES, REPORTED, UNDECIDED, Claim, Reading, Study
from common import Network, Scale, arguments, complete, settle

VERDICTS = (AGREES, DISAGREES, UNDECIDED, REPORTED)


def make_page(folder: Path, scale: str, networks: Sequence[Network]) -> str:
    """The page as Markdown, from the outputs in `folder`."""
    studies = [Study(network, folder / network.name) for network in networks]
    readings = {claim.title: claim.readings(studies) for claim in CLAIMS}
    counts = Counter(r.verdict for found in readings.values() for r in found)
    lines = [
        "# The paper's findings, measured again",
        "",
        f"Made by `python examples/paper/everything.py --scale {scale} --page docs/paper.md`. Each "
        "section gives a claim of Lan et al. 2019 (arXiv 1909.01440) or its author response, the "
        "criterion by which a measurement agrees with it, and what these runs measured, with 95 % "
        "confidence intervals or standard errors. Criteria were fixed before the runs and nothing "
        "was tuned; what disagrees is reported as it is. LC is in nats, on the training images, of "
        "the run with seed 0 unless said otherwise; negative LC helps.",
        "",
        *_caution(scale),
        *_setting(folder, scale, networks),
        "",
        "Readings: " + ", ".join(f"{counts[name]} {name}" for name in VERDICTS) + ".",
    ]
    for claim in CLAIMS:
        lines += ["", *_section(claim, readings[claim.title])]
    return "\n".join(lines) + "\n"


def _caution(scale: str) -> Iterator[str]:
    if scale != "full":
        yield (
            "**Mind the scale.** The paper looks at whole trainings on all images. These runs are "
            "the first steps on few images, where the loss falls fastest: more parameters help "
            "than later on, steps are long for a quadrature, and layers that come to hurt late "
            "have not done so yet. What disagrees here may agree at `--scale full`, which was not "
            "run."
        )
        yield ""


def _setting(folder: Path, scale: str, networks: Sequence[Network]) -> Iterator[str]:
    yield f"Scale `{scale}`:"
    yield ""
    yield "| network | parameters | training images | validation images | steps | runs complete |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for network in networks:
        size = network.scales[scale]
        runs = list(network.runs(size))
        done = sum(_done(folder / network.name / f"{c.name}-{seed}", size) for c, seed in runs)
        numel = sum(parameter.numel() for parameter in network.model().parameters())
        yield (
            f"| {network.title} | {numel:,} | {size.train:,} | {size.val:,} | {size.steps:,} | "
            f"{done} of {len(runs)} |"
        )


def _done(place: Path, size: Scale) -> bool:
    return complete(place / "out", size)


def _section(claim: Claim, readings: Sequence[Reading]) -> Iterator[str]:
    yield f"## {claim.title}"
    yield ""
    yield f"Said: {claim.said}  "
    if claim.criterion.startswith(REPORTED):
        yield f"Judged: no, {claim.criterion} only."
    else:
        yield f"Agrees if: {claim.criterion}."
    yield ""
    if not readings:
        yield "Not measured in these runs."
        return
    yield "| network | measured | verdict |"
    yield "| --- | --- | --- |"
    for reading in readings:
        yield f"| {reading.network} | {reading.measured} | {reading.verdict} |"


def main() -> None:
    """Print the page."""
    from everything import NETWORKS

    options = arguments(__doc__).parse_args()
    folder, _ = settle(options)
    print(make_page(folder, options.scale, NETWORKS), end="")


if __name__ == "__main__":
    main()
