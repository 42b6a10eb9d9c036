"""An offline run of Weights & Biases: tables of layers and a few curves; nothing is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lcray.errors import LcrayError
from lcray.tables.reading.results import Results

_CURVES = ("loss_end", "lc", "gap", "first_order_lc")
#: Views that become tables; they have one row for each split and layer.
_TABLES = ("closure", "layer_totals", "train_vs_rest")


def write_wandb(results: Results, folder: Path) -> tuple[Path, ...]:
    """Write one offline run under `folder`; ``wandb sync`` sends it. Raises as `lcray.export`."""
    try:
        import wandb
    except ImportError as error:
        raise LcrayError('the export needs wandb: pip install "lcray[wandb]"') from error
    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
    )
    results.output.beside(folder / "wandb")
    about = {"lcray_output": str(results.path), "rule": results.plan.settings.rule}
    with wandb.init(
        project="lcray", dir=str(folder), mode="offline", config=about, settings=settings
    ) as run:
        where = Path(run.dir).parent
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        for step, values in _curves(results):
            run.log({"step": step, **values})
        views = set(results.contents()["name"])
        for name in _TABLES:
            if name in views:
                run.log({name: wandb.Table(dataframe=_frame(results, name))})
        if "layer_totals" in views:
            for split in results.plan.splits:
                run.log({f"LC by layer, {split.name}": _bars(wandb, results, split.name)})
    return (where,)


def _curves(results: Results) -> list[tuple[int, dict[str, float]]]:
    """The curves of every split, by end step."""
    found: dict[int, dict[str, float]] = {}
    for row in results.intervals().to_dict("records"):
        values = found.setdefault(int(row["end_step"]), {})
        values |= {f"{row['split']}/{n}": row[n] for n in _CURVES if np.isfinite(row[n])}
    return sorted(found.items())


def _frame(results: Results, view: str) -> pd.DataFrame:
    frame = results.sql(f"SELECT * FROM {view}")
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].astype(str)
    return frame


def _bars(wandb: Any, results: Results, split: str) -> Any:
    frame = _frame(results, "layer_totals")
    table = wandb.Table(dataframe=frame.loc[frame["split"] == split, ["layer", "lc"]])
    return wandb.plot.bar(table, "layer", "lc", title=f"LC by layer, {split} (loss)")
