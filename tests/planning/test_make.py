from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcray.errors import UsageError
from lcray.execution.driver.analyze import load_plan
from lcray.planning.costs import estimate
from lcray.planning.make import extend_plan, make_plan, make_settings
from lcray.planning.plan import Crew, Plan, Probed, SplitPlan
from lcray.settings import Settings
from lcray.storage.files import FORMAT_VERSION
from lcray.tables.record import plan_digest
from lcray.tasks.layer import Layer

LAYERS = (
    Layer("conv1.weight", "conv1", "parameter", (4, 3), 0, True),
    Layer("conv1.bias", "conv1", "parameter", (4,), 0, True),
    Layer("fc.weight", "fc", "parameter", (2, 5), 0, True),
    Layer("scale", "", "parameter", (), None, True),
    Layer("conv1.mean", "conv1", "buffer", (4,), 0, False),
)
SAMPLED = {"rule": "simpson-sampled"}
TRAIN = SplitPlan("train", 100, 100, 100.0, 2.3, 4)
GROUPED = SplitPlan("val", 50, 50, 50.0, 2.3, 2, (0, 1, 2), (10.0, 20.0, 20.0), False)


def layer(numel: int, units: int = 1, name: str = "w") -> Layer:
    return Layer(name, "", "parameter", (units, numel // units), 0, True)


def draft(steps: Any = range(11), settings: Settings | None = None, **options: Any) -> Plan:
    layers = options.pop("layers", LAYERS)
    splits = options.pop("splits", (TRAIN,))
    for name, kind in (("crew", Crew), ("probed", Probed)):
        names = {each.name for each in fields(kind)} & options.keys()
        options[name] = kind(**{each: options.pop(each) for each in names})
    return make_plan(list(steps), settings or Settings(), layers, splits, **options)


def test_fisher_information_takes_its_part_of_an_interval() -> None:
    # Of eleven steps 3, 6 and 9 have it, and 0, which is the first of all: four times 5 s.
    plain, found = (
        draft(settings=make_settings({"fisher": every}), seconds={"train": 1.0}, fisher_seconds=5.0)
        for every in (None, 3)
    )
    assert plain.seconds is not None and found.seconds is not None
    assert found.seconds - plain.seconds == pytest.approx(4 * 5.0 / 10, rel=1e-12)


def refusal(**options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        draft(settings=make_settings(options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestSettings:
    def test_defaults_and_given_values(self) -> None:
        assert make_settings({}) == Settings()
        got = make_settings({"rule": "gauss", "splits": ["val"], "rtol": 1, "window": 7})
        assert got == Settings(rule="gauss", splits=("val",), rtol=1, window=7)

    def test_one_name_is_a_list_of_one(self) -> None:
        got = make_settings({"splits": "train", "trace": "fc.weight:3"})
        assert (got.splits, got.trace) == (("train",), ("fc.weight:3",))

    @pytest.mark.parametrize("name", ["samples", "sample_seed", "fisher", "window", "rtol"])
    def test_numbers_that_no_file_may_hold(self, name: str) -> None:
        assert refusal(**{name: 10**400}) == f"{name.replace('_', '-')}: must be below 9.22337e+18"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rul": "left"}, "unknown option 'rul': did you mean 'rule'?"),
            ({"rule": "simpsn"}, "unknown rule 'simpsn': did you mean 'simpson'?"),
            ({"rule": "gauss", "refine": True}, "rule 'gauss': cannot be refined; use simpson"),
            ({"rule": "simpson*2", "refine": True}, "rule 'simpson*2': cannot be refined"),
            ({"rule": "simpson*x"}, "panels must be a positive integer"),
            ({"batch_norm": "runing"}, "unknown batch-norm 'runing': did you mean 'running'?"),
            ({"dtype": "float16"}, "unknown dtype 'float16': did you mean"),
            ({"batch_size": 0}, "batch-size 0: must be at least 1"),
            ({"memory_format": "chanels_last"}, "did you mean 'channels_last'?"),
            ({"memory_format": None}, "memory-format None: must be of type str"),
            ({"max_panels": -1}, "max-panels -1: must be at least 1"),
            ({"max_panels": 4097}, "max-panels 4097: at most 4096"),
            ({"rule": "simpson*4097"}, "rule 'simpson': at most 4096 panels"),
            ({"window": 0}, "window 0: must be at least 1"),
            ({"rtol": 0.0}, "rtol 0.0: must be positive"),
            ({"rtol": -1e-3}, "rtol -0.001: must be positive"),
            ({"rtol": math.nan}, "rtol nan: must be positive"),
            ({"rtol": math.inf}, "rtol inf: must be positive"),
            ({"batch_seed": -1}, "batch-seed -1: must not be negative"),
            ({"trace_seed": -5}, "trace-seed -5: must not be negative"),
            ({"splits": ()}, "splits: name at least one"),
            ({"batch_size": "32"}, "batch-size '32': must be of type int"),
            ({"batch_size": 2.5}, "batch-size 2.5: must be of type int"),
            ({"batch_size": True}, "batch-size True: must be of type int"),
            ({"rtol": "1e-3"}, "rtol '1e-3': must be of type float"),
            ({"refine": 1}, "refine 1: must be of type bool"),
            ({"rule": None}, "rule None: must be of type str"),
            ({"parameters": "yes"}, "parameters 'yes': must be of type bool"),
            ({"splits": {"train"}}, "splits {'train'}: must be of type tuple"),
            ({"rule": "auto"}, "rule 'auto': is no longer offered; use simpson-sampled"),
            ({"rule": "auto*2"}, "rule 'auto*2': is no longer offered; use simpson-sampled"),
            ({"sampling_error": 0.0}, "sampling-error 0.0: must be positive"),
            ({**SAMPLED, "refine": True}, "refine: cannot be used with rule 'simpson-sampled'"),
            ({**SAMPLED, "samples": 9}, "samples: cannot be used with rule 'simpson-sampled'"),
            ({**SAMPLED, "batch_norm": "batch"}, "batch-norm: cannot be used with rule 'simpson"),
            ({**SAMPLED, "partial_sums": 2}, "partial-sums: cannot be used with rule 'simpson-sam"),
        ],
    )
    def test_what_cannot_be_used(self, options: dict, message: str) -> None:
        assert message in refusal(**options)

    def test_refining_simpson_is_fine(self) -> None:
        assert make_settings({"refine": True, "rule": "rk4"}).refine


class TestSpans:
    @given(
        steps=st.lists(st.integers(0, 10**6), min_size=2, max_size=80, unique=True).map(sorted),
        length=st.none() | st.integers(1, 90),
        workers=st.integers(1, 9),
    )
    def test_they_cover_every_interval_once_in_order(
        self, steps: list[int], length: int | None, workers: int
    ) -> None:
        plan = draft(steps, span_length=length, workers=workers)
        intervals = [pair for span in plan.spans for pair in span.intervals]
        assert intervals == list(pairwise(steps))
        assert plan.steps == tuple(steps)
        lengths = [len(span.intervals) for span in plan.spans]
        assert lengths == sorted(lengths, reverse=True)
        if length is not None:
            assert set(lengths[:-1]) <= {length} and lengths[0] == min(length, len(steps) - 1)

    def test_what_a_probe_measured_decides_their_length(self) -> None:
        """180 s a span; Simpson takes two gradients an interval, and the splits add up."""
        seconds = {"train": 2.0, "val": 1.0}
        splits = (TRAIN, replace(GROUPED, groups=()))
        made = draft(range(2001), splits=splits, workers=2, seconds=seconds, read_seconds=0.5)
        assert len(made.spans[0].intervals) == 30
        assert made.seconds == 6.5
        # Three groups that mix in batches take three passes each.
        grouped = draft(range(2001), splits=(TRAIN, GROUPED), workers=2, seconds=seconds)
        assert (grouped.seconds, len(grouped.spans[0].intervals)) == (10.0, 18)
        assert draft(range(2001), splits=splits, seconds=seconds, span_length=7).seconds == 6.0

    def test_parameters_stay_on_where_longer_spans_can_keep_them(self) -> None:
        """5e6 elements x 2,000 intervals: at most 200 spans of 10 keep a billion rows."""
        layers = [layer(5_000_000)]
        made = draft(range(2001), layers=layers, workers=2, seconds={"train": 90.0})
        assert len(made.spans[0].intervals) == 10
        assert len(draft(range(2001), workers=2, seconds={"train": 90.0}).spans[0].intervals) == 8

    def test_what_is_expected_decides_nothing_else(self) -> None:
        """Two plans that differ in it alone are the same plan, and give the same tables."""
        made = [draft(range(11), seconds={"train": s}) for s in (0.001, 0.002)]
        assert made[0].seconds != made[1].seconds
        assert made[0] == made[1]
        assert plan_digest(made[0].to_dict()) == plan_digest(made[1].to_dict())

    @pytest.mark.parametrize("steps", [[], [3]])
    def test_an_interval_needs_two_checkpoints(self, steps: list[int]) -> None:
        with pytest.raises(UsageError, match=rf"^{len(steps)} checkpoints: an interval needs two"):
            draft(steps)

    @given(n=st.integers(2, 40), more=st.integers(0, 40), length=st.integers(1, 50))
    def test_extension_keeps_the_spans_there_are(self, n: int, more: int, length: int) -> None:
        plan = draft(range(0, 2 * n, 2), span_length=length)
        steps = list(range(0, 2 * (n + more), 2))
        longer = extend_plan(plan, steps)
        assert longer.spans[: len(plan.spans)] == plan.spans
        assert longer.steps == tuple(steps)
        assert max(len(span.intervals) for span in longer.spans) <= max(
            len(span.intervals) for span in plan.spans
        )
        assert replace(longer, spans=plan.spans) == plan, "nothing else changes"
        forced = extend_plan(plan, steps, 3).spans[len(plan.spans) :]
        assert all(len(span.intervals) == 3 for span in forced[:-1])

    def test_extension_ignores_steps_that_came_between(self) -> None:
        plan = draft([0, 10, 20], span_length=2)
        assert extend_plan(plan, [0, 5, 10, 20]) == plan
        assert extend_plan(plan, [15, 20, 30]).steps == (0, 10, 20, 30)


class TestWindows:
    @pytest.mark.parametrize(
        ("first", "last", "window"),
        [
            (0, 1, 1),
            (0, 10, 1),
            (0, 11, 2),
            (0, 50, 5),
            (0, 51, 10),
            (0, 100, 10),
            (0, 101, 20),
            (5000, 5200, 20),
            (0, 1000, 100),
            (0, 99_999, 10_000),
            (0, 10**7, 10**6),
        ],
    )
    def test_about_ten_a_run_at_round_steps(self, first: int, last: int, window: int) -> None:
        assert draft([first, last]).window == window

    def test_a_given_width_wins(self) -> None:
        assert draft(range(101), Settings(window=7)).window == 7


class TestTables:
    def test_by_default(self) -> None:
        names = ("intervals", "layers", "units", "histograms", "parameters", "traces")
        assert draft().tables == names

    def test_groups_where_a_split_has_them(self) -> None:
        assert "groups" in draft(splits=(TRAIN, GROUPED)).tables

    def test_elements_only_on_request(self) -> None:
        assert "elements" in draft(settings=Settings(elements=True)).tables

    @pytest.mark.parametrize(
        ("numel", "parameters", "wanted"),
        [
            (100_000_000, None, True),
            (100_000_001, None, False),
            (100_000_001, True, True),
            (100, False, False),
        ],
    )
    def test_parameters_go_off_above_a_billion_rows(self, numel, parameters, wanted) -> None:
        """Ten spans: P × spans is 1e9 at 1e8 parameters."""
        settings = Settings(parameters=parameters)
        plan = draft(range(11), settings, layers=[layer(numel)], span_length=1)
        assert len(plan.spans) == 10
        assert ("parameters" in plan.tables) is wanted
        assert ("traces" in plan.tables) is wanted

    @pytest.mark.parametrize(
        ("units", "ask", "wanted"), [(10_000, False, 1), (10_001, False, 0), (10_001, True, 1)]
    )
    def test_units_of_very_wide_layers_on_request(self, units, ask, wanted) -> None:
        plan = draft(settings=Settings(units=ask), layers=[layer(units, units)])
        assert len(plan.unit_layers) == wanted
        assert plan.detail_layers == ("w",), "the other tables keep it"


class TestPatterns:
    def test_all_layers_by_default_buffers_in_units_alone(self) -> None:
        plan = draft()
        assert plan.detail_layers == ("conv1.weight", "conv1.bias", "fc.weight", "scale")
        assert plan.unit_layers == (*plan.detail_layers, "conv1.mean")

    def test_a_pattern_narrows(self) -> None:
        plan = draft(settings=Settings(layers="conv*"))
        assert plan.detail_layers == ("conv1.weight", "conv1.bias")
        assert plan.unit_layers == ("conv1.weight", "conv1.bias", "conv1.mean")
        plan = draft(settings=Settings(layers="*.weight"))
        assert plan.unit_layers == plan.detail_layers == ("conv1.weight", "fc.weight")
        assert plan.layers == LAYERS, "the table of layers is whole"

    def test_a_pattern_that_matches_nothing_names_the_nearest(self) -> None:
        message = refusal(layers="conv1.weigth")
        assert "unknown layer 'conv1.weigth': did you mean 'conv1.weight'?" in message
        assert "unknown layer 'Conv*'" in refusal(layers="Conv*"), "case counts"


class TestTraces:
    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ("fc.weight", "trace 'fc.weight': must have the form layer:index"),
            ("fc.weight:", "must have the form layer:index"),
            (":3", "must have the form layer:index"),
            ("fc.weight:-1", "must have the form layer:index"),
            ("fc.weight:1.5", "must have the form layer:index"),
            ("fc.weigt:1", "unknown layer 'fc.weigt': did you mean 'fc.weight'?"),
            ("fc.weight:" + "9" * 5000, "the layer has 10 elements, from 0"),
            ("fc.weight:٣", "must have the form layer:index"),
            ("fc.weight:10", "trace 'fc.weight:10': the layer has 10 elements, from 0"),
            ("conv1.mean:0", "unknown layer 'conv1.mean'"),
        ],
    )
    def test_items_that_do_not_exist(self, item: str, message: str) -> None:
        assert message in refusal(trace=(item,))

    def test_the_last_element_exists(self) -> None:
        assert draft(settings=Settings(trace=("fc.weight:9", "scale:0"))).settings.trace

    @given(
        n=st.integers(1, 30_000),
        n_layers=st.integers(1, 40),
        n_splits=st.integers(1, 4),
    )
    def test_the_sample_keeps_the_table_below_ten_million_rows(self, n, n_layers, n_splits) -> None:
        layers = [layer(10, name=f"w{i}") for i in range(n_layers)]
        plan = draft(range(n + 1), layers=layers, splits=[TRAIN] * n_splits, span_length=10**6)
        rows = plan.trace_sample * n * n_layers * n_splits
        assert rows <= 10_000_000
        assert plan.trace_sample == 256 or rows + n * n_layers * n_splits > 10_000_000


class TestEstimate:
    @pytest.mark.parametrize(
        ("rule", "gradients"),
        [
            # 10 intervals in spans of 4, 4 and 2. An endpoint serves both its intervals, but
            # spans share nothing: a span of n intervals has n + 1 endpoints.
            ("left", 10),
            ("midpoint", 10),
            ("trapezoid", 13),
            ("simpson", 13 + 10),
            ("simpson*2", 13 + 30),
            ("gauss-lobatto", 13 + 20),
            ("gauss-2", 20),
            ("gauss", 30),
            ("trapezoid*4", 13 + 30),
        ],
    )
    def test_gradients(self, rule: str, gradients: int) -> None:
        plan = draft(range(11), Settings(rule=rule), span_length=4)
        assert estimate(plan, 1).n_gradients == gradients
        two = draft(range(11), Settings(rule=rule), span_length=4, splits=(TRAIN, GROUPED))
        assert estimate(two, 1).n_gradients == 2 * gradients
        assert not estimate(two, 1).is_least

    def test_samples_of_batches_count_as_the_least_that_they_can_be(self) -> None:
        split = replace(TRAIN, n_batches=120)
        plan = draft(
            range(38), Settings(rule="simpson-sampled"), span_length=32, splits=(split,)
        )  # 32 and 5 intervals: three blocks, the first interval of each with all batches
        assert estimate(plan, 1).n_gradients == math.ceil(37 + 2 + 3 + (37 - 3) * 12 / 120)
        assert estimate(plan, 1).is_least
        cost = estimate(plan, 1, seconds={"train": 10.0}).seconds
        assert cost == pytest.approx(10 * (42 + 34 * 0.1))
        strata = replace(split, groups=tuple(range(20)), sorted_by_group=True)
        wide = draft(
            range(38), Settings(rule="simpson-sampled"), span_length=32, splits=(strata,)
        )  # two batches of every group
        assert estimate(wide, 1).n_gradients == math.ceil(42 + 34 * 40 / 120)
        few = draft(range(38), Settings(rule="simpson-sampled"), span_length=32)  # 4 batches: all
        assert estimate(few, 1).n_gradients == 2 + 2 * 37

    def test_spans_are_whole_blocks_where_batches_are_sampled(self) -> None:
        settings = Settings(rule="simpson-sampled")
        for n in (5, 16, 40, 300, 5000):
            spans = draft(range(n + 1), settings, crew=Crew(workers=3)).spans
            assert all(span.n_intervals % 16 == 0 for span in spans[:-1])
        with pytest.raises(UsageError, match="span-length 20: must be a multiple of 16"):
            draft(range(38), settings, span_length=20)
        with pytest.raises(UsageError, match="adds gradients in one part"):
            draft(range(38), settings, partial_sums=2)

    def test_refinement_makes_a_lower_bound(self) -> None:
        assert estimate(draft(settings=Settings(refine=True)), 1).is_least

    def test_seconds_follow_the_longest_share(self) -> None:
        plan = draft(range(11), span_length=4)  # 23 gradients in 3 spans
        assert estimate(plan, 1, seconds={"train": 2.0}).seconds == pytest.approx(46)
        assert estimate(plan, 3, seconds={"train": 2.0}).seconds == pytest.approx(46 / 3)
        assert estimate(plan, 2, seconds={"train": 2.0}).seconds == pytest.approx(46 * 2 / 3)
        assert estimate(plan, 9, seconds={"train": 2.0}).seconds == pytest.approx(46 / 3)
        assert estimate(plan, 1).seconds is None

    def test_groups_cost_passes_unless_batches_are_sorted(self) -> None:
        seconds = {"val": 1.0}
        plan = draft(range(11), span_length=10, splits=(GROUPED,))  # 21 gradients, 3 groups
        assert estimate(plan, 1, seconds=seconds).seconds == pytest.approx(63)
        free = draft(range(11), span_length=10, splits=(replace(GROUPED, sorted_by_group=True),))
        assert estimate(free, 1, seconds=seconds).seconds == pytest.approx(21)

    def test_rows_are_exact_where_they_can_be(self) -> None:
        settings = Settings(elements=True, window=5)
        plan = draft(range(11), settings, splits=(TRAIN, GROUPED))
        rows = estimate(plan, 1).rows
        assert rows["intervals"] == 2 * 10
        assert rows["layers"] == 2 * 10 * 5
        assert rows["units"] == 2 * 10 * (4 + 4 + 2 + 1 + 4)
        assert rows["groups"] == 3 * 10 * 5
        assert rows["parameters"] == 2 * (12 + 4 + 10 + 1)
        assert rows["traces"] == 2 * 10 * (12 + 4 + 10 + 1)
        assert rows["elements"] == 2 * 10 * (12 + 4 + 10 + 1)
        assert set(rows) == set(plan.tables)
        assert estimate(plan, 1).n_intervals == 10

    def test_memory_holds_what_the_probe_saw_and_the_vectors(self) -> None:
        plan = draft()
        assert estimate(plan, 1).memory_bytes is None
        found = estimate(plan, 1, worker_bytes=10**9).memory_bytes
        # 63 bytes an element, and the rows of `units` and `traces` of a span of 8 intervals.
        assert found == 10**9 + 63 * 31 + 24 * 8 * (15 + 27)

    def test_disk_grows_with_what_is_asked_for(self) -> None:
        plain = estimate(draft(), 1).disk_bytes
        with_elements = estimate(draft(settings=Settings(elements=True)), 1).disk_bytes
        # Two spans and the table have a file more each.
        assert with_elements - plain == 10 * 27 * 8 + 3 * 9000


def save(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A plan of three spans in a file, edited by hand."""
    made = draft(range(7), Settings(window=2, elements=True), span_length=2)
    data = made.to_dict()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format_version": FORMAT_VERSION, "plan": data}))
    return path


def spans(*steps: list[Any]) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> None:
        form = data["spans"][0]
        data["spans"] = [{"steps": part} if isinstance(form, dict) else part for part in steps]

    return change


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.__setitem__(name, value)


def put_setting(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["settings"].__setitem__(name, value)


EDITS = {
    "window 0": put("window", 0),
    "window -3": put("window", -3),
    "window 1.5": put("window", 1.5),
    "no spans": spans(),
    "a span of one step": spans([0]),
    "half steps": spans([0, 0.5, 1]),
    "backwards": spans([3, 2, 1]),
    "twice": spans([0, 1, 1, 2]),
    "overlapping": spans([0, 1, 2], [1, 2, 3]),
    "a gap": spans([0, 1, 2], [3, 4]),
    "trace_sample": put("trace_sample", -1),
    "threads": put("threads", 0),
    "a table": put("tables", ["intervals", "layers", "nonsense"]),
    "a layer of units": put("unit_layers", ["nonsense"]),
    "a layer of details": put("detail_layers", ["nonsense"]),
    "no layers": put("layers", []),
    "no splits": put("splits", []),
    "a split twice": lambda data: data["splits"].append(data["splits"][0]),
    "a layer twice": lambda data: data["layers"].append(data["layers"][0]),
    "device": put("device_kind", "tpu"),
    "dtype": put_setting("dtype", "float16"),
    "batch size of the settings": put_setting("batch_size", -1),
    "another batch size than the plan's": put_setting("batch_size", 7),
    "another format than the plan's": put_setting("memory_format", "channels_last"),
    "batch size": put("batch_size", 0),
    "half a sample": put("batch_size", 2.5),
    "memory format": put("memory_format", "auto"),
    "rule": put_setting("rule", "simpsom"),
    "panels": put_setting("rule", "simpson*1000000000"),
    "panels beyond all numbers": put_setting("rule", "simpson*" + "9" * 5000),
    "a cap beyond what refining bears": put_setting("max_panels", 10**9),
    "an element that no layer has": put_setting("trace", ["fc.weight:" + "9" * 30]),
    "duration": put("seconds", -1.0),
    "duration in words": put("seconds", "soon"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_plans_that_were_edited_into_nonsense(tmp_path: Path, edit: str) -> None:
    assert load_plan(save(tmp_path, lambda data: None)).steps == tuple(range(7))
    with pytest.raises(UsageError) as caught:
        load_plan(save(tmp_path, EDITS[edit]))
    assert "\n" not in str(caught.value)


def test_a_pattern_may_be_a_name_with_a_bracket() -> None:
    layers = (layer(4, name="a[0].w"), layer(4, name="a1.w"))
    made = draft(settings=Settings(layers="a[0].w"), layers=layers)
    assert made.detail_layers == ("a[0].w",)


@pytest.mark.parametrize(
    ("settings", "probed", "planned"),
    [
        (Settings(), (None, None), (256, "contiguous")),
        (Settings(), (64, "channels_last"), (64, "channels_last")),
        (Settings(batch_size=5), (64, "channels_last"), (5, "channels_last")),
        (Settings(memory_format="contiguous"), (64, "channels_last"), (64, "contiguous")),
        (Settings(memory_format="channels_last"), (64, None), (64, "channels_last")),
    ],
)
def test_what_was_asked_for_comes_before_what_a_probe_chose(settings, probed, planned) -> None:
    batch_size, memory_format = probed
    plan = draft(settings=settings, batch_size=batch_size, memory_format=memory_format)
    assert (plan.batch_size, plan.memory_format) == planned
    assert plan.settings == settings, "what was asked for is recorded as it was"
