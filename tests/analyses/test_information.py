from __future__ import annotations

from pathlib import Path

import numpy as np
import planting
import pytest

from lcray.analyses.information import fisher
from lcray.tables.reading.results import open_output


@pytest.fixture(scope="module")
def world() -> planting.World:
    return planting.make_world()


@pytest.fixture(scope="module")
def out(world: planting.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.write_reduced(tmp_path_factory.mktemp("information") / "out", world)


def test_means_over_steps_beside_sums_over_intervals(world: planting.World, out: Path) -> None:
    """Traces planted at steps 0, 4, 8 and 12: the run [0, 12) has three, the window [4, 8) one."""
    found = fisher(open_output(out), windows={"middle": "4:8"}).to_pandas()
    assert set(found["window"]) == {"run", "middle"} and set(found["split"]) == {"val", "train"}
    planted = [row for row in planting.rows(world, "fisher") if row["split"] == "train"]
    layers = [layer.name for layer in world.plan.layers if layer.trainable]
    for window, first, end in (("run", 0, 12), ("middle", 4, 8)):
        rows = found[(found["window"] == window) & (found["split"] == "train")].set_index("layer")
        assert list(rows.index) == layers
        starts = [t for t, step in enumerate(world.steps[:-1]) if first <= step < end]
        lc = {name: float(world.lc["train", name][starts].sum()) for name in layers}
        here = [row for row in planted if first <= row["step"] < end]
        traces = {
            name: np.mean([row["trace_true"] for row in here if row["layer"] == name])
            for name in layers
        }
        for name in layers:
            assert rows.loc[name, "n_steps"] == len(here) / len(layers)
            assert rows.loc[name, "lc"] == pytest.approx(lc[name], rel=1e-12)
            assert rows.loc[name, "lc_share"] == pytest.approx(lc[name] / sum(lc.values()))
            assert rows.loc[name, "trace_true"] == pytest.approx(traces[name], rel=1e-12)
            assert rows.loc[name, "true_share"] == pytest.approx(
                traces[name] / sum(traces.values())
            )
            errors = [row["trace_true_se"] for row in here if row["layer"] == name]
            assert rows.loc[name, "trace_true_se"] == pytest.approx(np.mean(errors), rel=1e-12)


def test_a_window_without_traces_has_no_rows(out: Path) -> None:
    found = fisher(open_output(out), windows={"none": "2:4"}).to_pandas()
    assert set(found["window"]) == {"run"}
