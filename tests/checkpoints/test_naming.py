"""Steps in file names, and tensor names without wrapper prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcray.checkpoints import naming
from lcray.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000010.safetensors", 10),
        ("step_10.safetensors", 10),
        ("checkpoint-500", 500),
        ("model_step10.safetensors", 10),
        ("00007.safetensors", 7),
        ("resnet20_step10.safetensors", 10),
        ("epoch=3-step=500.safetensors", 500),
        ("vit16-ckpt-40.safetensors", 40),
        ("step-10.safetensors.index.json", 10),
        ("model.safetensors", None),
        ("model².safetensors", None),
        ("step__7.safetensors", 7),
        ("step-7.fp16.safetensors", 7),
        ("step-7-loss-0.25.safetensors", 7),
        ("lr1e-3-step-500.safetensors", 500),
        ("v1.5-step-+x-iter7.safetensors", 7),
        ("pythia-70m-step1000.safetensors", 1000),
        ("step7e.safetensors", 7),
        ("step-10mb.safetensors", 10),
        ("0" * 100 + "7.safetensors", 7),
        (f"step-{2**63 - 1}.safetensors", 2**63 - 1),
    ],
)
def test_step_in_a_name(name, step):
    assert naming.parse_step(name) == step


NOT_WHOLE = "a sign, a fraction, an exponent or a letter for thousands"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("step--7.safetensors", NOT_WHOLE),
        ("step_-7.safetensors", NOT_WHOLE),
        ("step=-7.safetensors", NOT_WHOLE),
        ("-7.safetensors", NOT_WHOLE),
        ("step+7.safetensors", NOT_WHOLE),
        ("step\N{MINUS SIGN}7.safetensors", NOT_WHOLE),
        ("step-7.5.safetensors", NOT_WHOLE),
        ("epoch=1-step=7.50.safetensors", NOT_WHOLE),
        ("step-1,000.safetensors", NOT_WHOLE),
        ("step-1e3.safetensors", NOT_WHOLE),
        ("step-1e-3", NOT_WHOLE),
        ("step-2E+3.safetensors", NOT_WHOLE),
        ("step-10k.safetensors", NOT_WHOLE),
        ("checkpoint_1M", NOT_WHOLE),
        ("pythia-70m.safetensors", NOT_WHOLE),
        ("step-٧.safetensors", "not written in the digits 0 to 9"),
        ("step-1٧.safetensors", "not written in the digits 0 to 9"),
        ("step-²7.safetensors", "not written in the digits 0 to 9"),
        ("step-７.safetensors", "not written in the digits 0 to 9"),
        (f"step-{2**63}.safetensors", r"steps end at 2\*\*63"),
        ("step-" + "9" * 5000, r"steps end at 2\*\*63"),
    ],
)
def test_digits_that_are_part_of_another_number_are_no_step(name, why):
    with pytest.raises(CheckpointError, match=why):
        naming.parse_step(name)


@given(st.integers(0, 2**63 - 1), st.sampled_from(["step-{:08d}", "checkpoint-{}", "{:d}", "s{}e"]))
def test_every_whole_number_is_a_step(step, form):
    assert naming.parse_step(form.format(step) + ".safetensors") == step


def test_ambiguous_name_is_an_error():
    with pytest.raises(CheckpointError, match="which of 20, 3 is the step"):
        naming.parse_step("resnet20-3.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step-1.safetensors", True),
        ("step-1.safetensors.tmp", False),
        (".step-1.safetensors", False),
        ("step-1.safetensors.tmp123", False),
        ("optimizer_step10.safetensors", False),
        ("step-10-optimizer.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("step-1.pt", False),
    ],
)
def test_which_files_hold_weights(name, expected):
    assert naming.is_weights(name) is expected


NAMES = ["fc1.weight", "fc1.bias", "block.module.weight", "module.head.weight"]


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module.{}",
    ],
)
def test_wrapped_and_bare_models_have_the_same_names(wrap):
    keys = [wrap.format(name) for name in NAMES]
    assert naming.canonical_names(keys) == dict(zip(keys, NAMES, strict=True))


def test_inner_compiled_submodule_and_kept_user_module():
    keys = ["a._orig_mod.weight", "module.weight"]
    assert list(naming.canonical_names(keys).values()) == ["a.weight", "module.weight"]


def test_two_keys_that_become_one_name_are_an_error():
    with pytest.raises(CheckpointError, match=r"'a\.w' and 'a\._orig_mod\.w' are both 'a\.w'"):
        naming.canonical_names(["a.w", "a._orig_mod.w"])


part = st.sampled_from(["module", "_orig_mod", "a", "b"])


@given(
    st.lists(st.lists(part, min_size=1, max_size=4).map(lambda p: ".".join([*p, "w"])), unique=True)
)
def test_canonical_names_are_a_fixed_point_and_agree_with_any_wrapping(keys):
    try:
        names = naming.canonical_names(keys)
    except CheckpointError:
        return
    values = list(names.values())
    assert list(naming.canonical_names(values).values()) == values
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        assert list(naming.canonical_names(prefix + key for key in keys).values()) == values


@pytest.mark.parametrize(
    ("name", "pattern", "wanted"),
    [
        ("a[0].w", "a[0].w", True),
        ("a0.w", "a[0].w", True),
        ("a1.w", "a[0].w", False),
        ("conv1.w", "conv*", True),
        ("Conv1.w", "conv*", False),
        ("a*", "a*", True),
    ],
)
def test_a_name_matches_itself_and_patterns(name, pattern, wanted):
    assert naming.matches(name, pattern) is wanted
