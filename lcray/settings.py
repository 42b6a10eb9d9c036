"""What an analysis may be asked for; imports nothing, so that the command line is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the user asked for; each decides numbers or tables, and is recorded with them.

    Attributes:
        rule: name of the quadrature rule.
        refine: halve the panels of intervals that have not converged (Simpson only).
        rtol: an interval has converged when |gap| <= max(rtol·|loss change|, atol).
        max_panels: the cap of the refinement.
        splits: the splits to analyze; None for all of the task's.
        samples: the most samples of a split that are taken, drawn at random; None takes all.
        sample_seed: seed of the draw.
        layers: a pattern (``conv*``) for the layers that get rows in the tables below `layers`.
        batch_norm: ``running`` (the checkpoint's statistics) or ``batch`` (the batch's own).
        dtype: of the forward and backward pass, ``float32`` or ``float64``.
        batch_size: samples a batch; None has a probe choose, or is 256 where batches are part of
            the loss.
        memory_format: ``contiguous``, ``channels_last`` (convolutions compute on images with the
            channels innermost) or ``auto``, which has a probe choose.
        partial_sums: parts that the batches of a split are summed in, so that as many workers may
            share a gradient; None for as many as do (see `lcray.Resources.data_parallel`).
        batch_seed: seed of the permutation that cuts the batches where they are part of the loss.
        partial: checkpoints may lack tensors, which then keep the values of the task's model.
        window: width of the base windows in steps; None chooses about ten a run.
        elements: write the `elements` table.
        parameters: write the `parameters` and `traces` tables; None decides by size.
        units: write `units` also for layers with more than 10,000 units.
        trace: elements to trace besides the sample, as ``layer:index``.
        trace_seed: seed of the sample of traced elements.
        deterministic: enforce deterministic algorithms (they only cost anything on CUDA).
        fisher: write the `fisher` table, at the steps that are multiples of this; None for none.
        fisher_kind: ``both``, or ``empirical`` for tasks without `sample_targets`.
        fisher_samples: the most samples of a split that it takes.
        fisher_seed: seed of these samples, and of the targets that the model draws.
    """

    rule: str = "simpson"
    refine: bool = False
    rtol: float = 1e-3
    max_panels: int = 16
    splits: tuple[str, ...] | None = None
    samples: int | None = None
    sample_seed: int = 0
    layers: str | None = None
    batch_norm: str = "running"
    dtype: str = "float32"
    batch_size: int | None = None
    memory_format: str = "auto"
    partial_sums: int | None = None
    batch_seed: int = 0
    partial: bool = False
    window: int | None = None
    elements: bool = False
    parameters: bool | None = None
    units: bool = False
    trace: tuple[str, ...] = ()
    trace_seed: int = 0
    deterministic: bool = True
    fisher: int | None = None
    fisher_kind: str = "both"
    fisher_samples: int = 256
    fisher_seed: int = 0
