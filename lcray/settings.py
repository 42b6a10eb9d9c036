"""The settings of an analysis; imports nothing heavy, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from inspect import cleandoc
from typing import Any, TypedDict, TypeVar

Kind = TypeVar("Kind")

INTEGRAL, DATA, TABLES = "The integral", "Data and loss", "Tables"
FISHER, WORKERS = "Fisher information", "Workers"
#: The sections of ``--help`` that options stand in, in their order.
SECTIONS = (INTEGRAL, DATA, TABLES, FISHER, WORKERS)


@dataclass(frozen=True)
class Option:
    """The meaning of a field, and how the command line shows it with its name, type and default.

    Attributes:
        section: of ``--help``; empty for the options of a command alone.
        help: its meaning, also for the documentation.
        otherwise: the default in words, where its value is not enough.
        choices: the values it may have; with a `metavar`, some of them.
        metavar: how its value is shown.
        flag: the name on the command line, where it is not the field's.
        bare: the value of the flag alone.
    """

    section: str
    help: str
    otherwise: str = ""
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str | None = None
    bare: int | None = None


def option(default: Any, section: str, help: str, **more: Any) -> Any:
    """A field that is an option; all but the default are the arguments of `Option`."""
    metadata = {"option": Option(section, help, **more)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(each: Field[Any]) -> Option:
    """The `Option` of a field."""
    found: Option = each.metadata["option"]
    return found


def flag_of(each: Field[Any]) -> str:
    """The name of a field on the command line, without the dashes in front."""
    return option_of(each).flag or each.name.replace("_", "-")


def help_of(each: Field[Any]) -> str:
    """The help of a field, with its default unless that is off or none."""
    told, value = option_of(each), each.default
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    default = told.otherwise or (str(value) if is_plain else "")
    return f"{told.help}  [default: {default}]" if default else told.help


def documented(kind: type[Kind]) -> type[Kind]:
    """Adds the help of each option to the docstring of a dataclass."""
    lines = [f"    {each.name}: {help_of(each)}" for each in fields(kind)]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines])
    return kind


@documented
@dataclass(frozen=True)
class Settings:
    """The settings that were asked for; each decides numbers or tables, and is recorded with them.

    An interval has converged when |gap| <= max(rtol·|loss change|, atol).
    """

    rule: str = option(
        "simpson",
        INTEGRAL,
        "left (first order), midpoint, trapezoid, simpson (RK4), gauss-lobatto, gauss-2, gauss; "
        "rule*n on n panels; or simpson-sampled: midpoints on a sample of the batches, with a "
        "standard error.",
        choices=(
            "left",
            "midpoint",
            "trapezoid",
            "simpson",
            "simpson-sampled",
            "gauss-lobatto",
            "gauss-2",
            "gauss",
        ),
        metavar="NAME",
    )
    refine: bool = option(False, INTEGRAL, "Halve the panels of intervals that miss the tolerance.")
    rtol: float = option(1e-3, INTEGRAL, "Tolerance of the gap, relative to the loss change.")
    max_panels: int = option(16, INTEGRAL, "The most panels that refinement may reach.")
    sampling_error: float = option(
        0.01,
        INTEGRAL,
        "Standard error that simpson-sampled aims at, relative to the LC of the layers.",
    )
    splits: tuple[str, ...] | None = option(
        None, DATA, "Only this split (repeatable).", otherwise="all", flag="split", metavar="NAME"
    )
    samples: int | None = option(
        None,
        DATA,
        "The most samples to take of a split, drawn at random; results are then estimates with "
        "confidence intervals.",
        otherwise="all",
    )
    sample_seed: int = option(0, DATA, "Seed of that draw, and of those of simpson-sampled.")
    layers: str | None = option(
        None, TABLES, "Only these layers in the detailed tables, as in 'conv*'.", metavar="PATTERN"
    )
    batch_norm: str = option(
        "running",
        DATA,
        "running: the checkpoint's statistics; batch: the batch's own.",
        choices=("running", "batch"),
    )
    dtype: str = option(
        "float32",
        DATA,
        "Precision of the forward and backward pass; sums are always in float64.",
        choices=("float32", "float64"),
    )
    batch_size: int | None = option(
        None,
        DATA,
        "Samples per batch.",
        otherwise="chosen by a short probe, or 256 where batches are part of the loss",
    )
    memory_format: str = option(
        "auto",
        DATA,
        "auto: the one that a short probe finds faster.",
        choices=("contiguous", "channels_last", "auto"),
    )
    partial_sums: int | None = option(
        None,
        DATA,
        "Number of partial sums of each gradient; at most as many workers can share it.",
        otherwise="--data-parallel",
    )
    batch_seed: int = option(0, DATA, "Seed of the batches where they are part of the loss.")
    partial: bool = option(
        False,
        DATA,
        "Checkpoints may lack tensors (adapters), which keep the values of the task's model.",
    )
    window: int | None = option(
        None,
        TABLES,
        "Width of the windows of histograms and fits, in steps.",
        otherwise="about ten windows per run",
    )
    elements: bool = option(False, TABLES, "Write the elements table: LC of every element.")
    parameters: bool | None = option(
        None, TABLES, "Force the parameters and traces tables on or off.", otherwise="by size"
    )
    units: bool = option(False, TABLES, "Write units also for layers with more than 10,000.")
    trace: tuple[str, ...] = option(
        (),
        TABLES,
        "Trace this element, in addition to a random sample of each layer (repeatable).",
        metavar="LAYER:INDEX",
    )
    trace_seed: int = option(0, TABLES, "Seed of the sample of traced elements.")
    deterministic: bool = option(
        True, DATA, "Enforce deterministic algorithms on CUDA.", otherwise="on"
    )
    fisher: int | None = option(
        None,
        FISHER,
        "Write the fisher table, at every step or, as --fisher=K, at the multiples of K: the trace "
        "of each layer's Fisher information, by targets that the model draws (sample_targets of "
        "the task) and by those of the data.",
        metavar="[=K]",
        bare=1,
    )
    fisher_kind: str = option(
        "both",
        FISHER,
        "empirical: by the data's targets alone.",
        choices=("both", "empirical"),
    )
    fisher_samples: int = option(256, FISHER, "The most samples of a split that fisher takes.")
    fisher_seed: int = option(0, FISHER, "Seed of these samples, and of the targets drawn.")


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments; names may be one string or several."""

    rule: str
    refine: bool
    rtol: float
    max_panels: int
    sampling_error: float
    splits: Sequence[str] | None
    samples: int | None
    sample_seed: int
    layers: str | None
    batch_norm: str
    dtype: str
    batch_size: int | None
    memory_format: str
    partial_sums: int | None
    batch_seed: int
    partial: bool
    window: int | None
    elements: bool
    parameters: bool | None
    units: bool
    trace: Sequence[str]
    trace_seed: int
    deterministic: bool
    fisher: int | None
    fisher_kind: str
    fisher_samples: int
    fisher_seed: int


class PlanOptions(Options, total=False):
    """The options that a plan fixes: settings, the steps of the run, and how they are cut.

    Attributes:
        steps: the range of steps to analyze, ``a:b``.
        span_length: intervals per span; chosen by their duration and number otherwise.
    """

    steps: str | None
    span_length: int | None
