"""The audit finds what was planted, and nothing in a clean run."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lcray.checkpoints import Recorder, inspect
from lcray.errors import CheckpointError

N = 14


def write(directory, step, tensors):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / f"step-{step}.safetensors")


def clean(directory, steps=range(N), dtype=torch.float32):
    """Two layers that move by about the same norm each step, one frozen, a mask and a counter."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(20, 10, generator=generator),
        "b": torch.randn(10, generator=generator),
        "frozen": torch.ones(3),
        "mask": torch.tensor([0.0, -math.inf]),
    }
    for step in steps:
        for name in ("a", "b"):
            state[name] += 0.1 * torch.randn(state[name].shape, generator=generator)
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        write(directory, step, {**stored, "n": torch.tensor(step)})


def change(directory, step, **changes):
    path = directory / f"step-{step}.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def kinds(report, *, severity=None):
    return [
        (finding.kind, finding.step, finding.layer)
        for finding in report.findings
        if severity is None or finding.severity == severity
    ]


QUIET = [("nonfinite", 0, "mask"), ("frozen", None, "frozen"), ("frozen", None, "mask")]


def test_a_clean_run(tmp_path):
    clean(tmp_path)
    report = inspect(tmp_path)
    assert kinds(report) == QUIET
    assert {finding.severity for finding in report.findings} == {"info"}
    assert report.ok
    assert report.steps == tuple(range(N))
    assert report.n_readable == N
    assert report.n_tensors == 5
    assert report.n_elements == 200 + 10 + 3 + 2
    assert report.dtypes == {"float32": 4, "int64": 1}
    assert report.frozen == ("frozen", "mask")
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_one_checkpoint_is_too_few(tmp_path):
    clean(tmp_path, steps=[7])
    (found,) = (f for f in inspect(tmp_path).findings if f.kind == "gap")
    assert found.severity == "warning"
    assert found.message == "one checkpoint; an analysis needs at least 2"


def test_one_gap_and_many(tmp_path):
    clean(tmp_path / "one", [0, 1, 2, 3, 4, 5, 8, 9, 10])
    assert ("gap", 5, None) in kinds(inspect(tmp_path / "one"), severity="warning")
    assert sum(kind == "gap" for kind, *_ in kinds(inspect(tmp_path / "one"))) == 1
    clean(tmp_path / "many", [2**i for i in range(9)])
    gaps = [f for f in inspect(tmp_path / "many").findings if f.kind == "gap"]
    assert [(f.step, f.message) for f in gaps] == [
        (None, "checkpoints are 1 to 128 steps apart; 7 of 8 intervals differ from the usual 1")
    ]


def test_a_gap_does_not_count_as_an_outlier_when_its_norm_is_in_proportion(tmp_path):
    for step in [*range(8), 28, *range(29, 36)]:
        write(tmp_path, step, {"a": torch.full((4,), float(step))})
    assert kinds(inspect(tmp_path)) == [("gap", 7, None)]


def test_duplicates(tmp_path):
    clean(tmp_path)
    (tmp_path / "step-6.safetensors").write_bytes((tmp_path / "step-5.safetensors").read_bytes())
    assert kinds(inspect(tmp_path), severity="warning") == [("duplicate", 6, None)]


def test_one_element_or_only_the_counter_is_no_duplicate(tmp_path):
    clean(tmp_path)
    (tmp_path / "step-6.safetensors").write_bytes((tmp_path / "step-5.safetensors").read_bytes())
    change(tmp_path, 6, n=torch.tensor(6))
    assert "duplicate" not in {kind for kind, *_ in kinds(inspect(tmp_path))}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_names_layer_and_first_step(tmp_path, bad):
    clean(tmp_path)
    for step in (7, 8, 9):
        b = load_file(tmp_path / f"step-{step}.safetensors")["b"]
        b[3] = bad
        change(tmp_path, step, b=b)
    report = inspect(tmp_path)
    assert kinds(report, severity="error") == [("nonfinite", 7, "b")]
    message = next(f.message for f in report.findings if f.severity == "error")
    assert ("1 NaN and 0 inf" if math.isnan(bad) else "0 NaN and 1 inf") in message
    assert not report.ok


def test_a_frozen_nan_is_still_an_error(tmp_path):
    for step in range(3):
        write(tmp_path, step, {"a": torch.tensor([math.nan]), "b": torch.tensor([float(step)])})
    assert kinds(inspect(tmp_path), severity="error") == [("nonfinite", 0, "a")]


@pytest.mark.parametrize(("factor", "found"), [(12.0, True), (1.5, False), (0.02, True)])
def test_outlier_steps(tmp_path, factor, found):
    value, state = 0.0, []
    for step in range(N):
        value += (factor if step == 8 else 1.0) * (1 + 0.05 * (-1) ** step)
        state.append(torch.full((10,), value, dtype=torch.float64))
        write(tmp_path, step, {"a": state[-1]})
    expected = [("outlier", 8, None)] if found else []
    assert kinds(inspect(tmp_path)) == expected


def test_a_decaying_learning_rate_is_no_outlier(tmp_path):
    value = 0.0
    for step in range(40):
        value += math.exp(-step / 5)
        write(tmp_path, step, {"a": torch.full((4,), value, dtype=torch.float64)})
    assert kinds(inspect(tmp_path)) == []


def test_names_shapes_and_dtypes(tmp_path):
    clean(tmp_path)
    change(tmp_path, 5, b=None, c=torch.ones(1))
    change(tmp_path, 9, a=torch.ones(2, 2), b=torch.ones(10, dtype=torch.float16))
    report = inspect(tmp_path)
    errors = set(kinds(report, severity="error"))
    assert errors == {
        ("names", 5, "b"),
        ("names", 5, "c"),
        ("names", 6, "b"),
        ("names", 6, "c"),
        ("shape", 9, "a"),
        ("shape", 10, "a"),
        ("dtype", 9, "b"),
        ("dtype", 10, "b"),
    }
    messages = " ".join(finding.message for finding in report.findings)
    assert "a changes shape from [20, 10] to [2, 2]" in messages
    assert "b changes from torch.float32 to torch.float16" in messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_low_precision_that_hides_updates(tmp_path, dtype):
    # Half of the elements move by far less than one unit in the last place of 1.0.
    base = torch.ones(100, dtype=torch.float64)
    for step in range(8):
        value = base.clone()
        value[:50] += 0.5 * step
        value[50:] += 1e-6 * step
        write(tmp_path, step, {"w": value.to(dtype), "free": torch.full((3,), float(step))})
    report = inspect(tmp_path)
    findings = [finding for finding in report.findings if finding.kind == "low_precision"]
    assert [(f.step, f.layer) for f in findings] == [(None, "w")]
    assert "50%" in findings[0].message


def test_low_precision_with_large_updates_is_quiet(tmp_path):
    clean(tmp_path, dtype=torch.bfloat16)
    assert "low_precision" not in {kind for kind, *_ in kinds(inspect(tmp_path))}


def test_torn_files_are_findings_and_the_rest_goes_on(tmp_path):
    clean(tmp_path)
    for step, content in ((0, b""), (4, b"\xff" * 40), (N - 1, None)):
        path = tmp_path / f"step-{step}.safetensors"
        path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    report = inspect(tmp_path)
    assert kinds(report, severity="error") == [("unreadable", step, None) for step in (0, 4, N - 1)]
    assert report.n_readable == N - 3 and len(report.steps) == N


def test_a_run_of_only_torn_files(tmp_path):
    for step in range(3):
        (tmp_path / f"step-{step}.safetensors").write_bytes(b"torn")
    report = inspect(tmp_path)
    assert (report.n_readable, report.n_tensors, report.frozen) == (0, 0, ())
    assert kinds(report) == [("unreadable", step, None) for step in range(3)]


def test_a_missing_shard_is_a_finding(tmp_path):
    for step in (0, 1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "checkpoint-0" / "model-00001-of-00001.safetensors")
    assert kinds(inspect(tmp_path)) == [("unreadable", 1, None)]


def test_a_run_without_step_0_says_so_unless_it_was_left_out_on_purpose(tmp_path):
    for step in (1, 2, 3):
        save_file({"a": torch.ones(1) * step}, tmp_path / f"step-{step}.safetensors")
    for steps in (None, "0:", "1:2", ":3"):
        (found,) = inspect(tmp_path, steps).findings
        assert (found.severity, found.kind, found.step) == ("warning", "start", 1)
        assert found.message == (
            "the run begins at step 1: step 0 is missing, so the initial weights and the first "
            "change of them, often the largest, are not part of it"
        )
    assert inspect(tmp_path, "2:").findings == ()
    save_file({"a": torch.ones(1) * 9}, tmp_path / "step-0.safetensors")
    for steps in (None, "0:", "1:"):
        assert inspect(tmp_path, steps).findings == ()


def test_steps_narrow_it_and_no_run_is_an_error(tmp_path):
    clean(tmp_path)
    (tmp_path / "step-9.safetensors").write_bytes(b"torn")
    assert inspect(tmp_path, "0:8").ok
    with pytest.raises(CheckpointError, match="no such run"):
        inspect(tmp_path / "none")


def test_a_recorded_run_with_a_frozen_layer(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    )
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Recorder(model, tmp_path, optimizer=optimizer):
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(32, 4)).square().mean().backward()
            optimizer.step()
    report = inspect(tmp_path)
    assert report.frozen == ("3.weight", "3.bias")
    assert report.ok and not kinds(report, severity="error")


def test_a_pattern_narrows_the_audit(tmp_path):
    for step in range(3):
        write(tmp_path, step, {"a": torch.full((2,), 1.0 + step), "b": torch.tensor([math.nan])})
    assert kinds(inspect(tmp_path), severity="error") == [("nonfinite", 0, "b")]
    narrowed = inspect(tmp_path, layers="a*")
    assert (narrowed.n_tensors, narrowed.ok) == (1, True)
    with pytest.raises(CheckpointError, match="unknown layer pattern 'c"):
        inspect(tmp_path, layers="c*")


def test_a_layer_with_a_bracket_is_found_by_its_name(tmp_path):
    for step in range(2):
        tensors = {"a[0].w": torch.tensor([math.nan]), "a1.w": torch.full((2,), float(step))}
        write(tmp_path, step, tensors)
    narrowed = inspect(tmp_path, layers="a[0].w")
    assert narrowed.n_tensors == 1
    assert kinds(narrowed, severity="error") == [("nonfinite", 0, "a[0].w")]
