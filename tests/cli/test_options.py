"""The options of the command line are the fields of `Settings` and `Resources`."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any, Unpack, get_type_hints

import click
import pytest

import lcray
from lcray.cli.app import app
from lcray.execution.driver.submit import JobOptions
from lcray.planning.make import make_settings
from lcray.settings import SECTIONS, Options, PlanOptions, Settings, option_of

FIELDS = [*fields(Settings), *fields(lcray.Resources)]
#: The type of an option by the annotation of its field.
TYPES = {
    "str": click.STRING,
    "int": click.INT,
    "float": click.FLOAT,
    "bool": click.BOOL,
    "tuple[str, ...]": click.STRING,
    "Mapping[str, float]": click.STRING,
}


def found(command: str, name: str) -> click.Option:
    (option,) = [each for each in app.commands[command].params if each.name == name]
    assert isinstance(option, click.Option)
    return option


@pytest.mark.parametrize("command", ["plan", "analyze", "submit"])
@pytest.mark.parametrize("each", FIELDS, ids=lambda each: each.name)
def test_a_field_is_an_option(each: Field[Any], command: str) -> None:
    option, told = found(command, each.name), option_of(each)
    if (command, each.name) == ("submit", "address"):
        assert option.metavar == "URL", "that of the job server"
        return
    assert type(option.type) is type(TYPES[str(each.type).removesuffix(" | None")])
    assert option.multiple == (str(each.type)[:5] in ("tuple", "Mappi"))
    assert (option.help or "").startswith(told.help)
    assert bool(option.secondary_opts) == (
        isinstance(option.type, click.types.BoolParamType) and each.default is not False
    )


@pytest.mark.parametrize("kind", [Settings, lcray.Resources])
def test_a_docstring_lists_the_fields_as_their_help_says(kind: type[Any]) -> None:
    lines = (kind.__doc__ or "").partition("\n\nAttributes:\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [each.name for each in fields(kind)]
    for each, line in zip(fields(kind), lines, strict=True):
        assert option_of(each).help in line


def test_python_takes_the_same_options_statically() -> None:
    """So that an editor completes them, and a type checker refuses others."""
    expected = {each.name: str(each.type) for each in fields(Settings)}
    found = {name: hint.__forward_arg__ for name, hint in Options.__annotations__.items()}
    # A list of names does as well as a tuple.
    assert found == {k: v.replace("tuple[str, ...]", "Sequence[str]") for k, v in expected.items()}
    assert not Options.__required_keys__ | JobOptions.__required_keys__


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lcray.allocate, Options),
        (lcray.plan, PlanOptions),
        (lcray.analyze, PlanOptions),
        (lcray.submit, JobOptions),
    ],
)
def test_the_verbs_take_them(function: Any, options: type[Any]) -> None:
    assert get_type_hints(function)["options"] == Unpack[options]


def test_a_job_is_asked_what_analyze_is() -> None:
    asked = [p.name for p in app.commands["analyze"].params if p.name in JobOptions.__annotations__]
    others = {"on_package", "on_submit", "on_log"}
    assert {*asked, *others} == {*JobOptions.__annotations__}


def test_options_not_given_leave_the_defaults_to_the_library() -> None:
    words = ["run", "--task", "mytask:task", "--out", "out"]
    params = app.commands["analyze"].make_context("analyze", words).params
    assert all(params[each.name] in (None, (), {}) for each in FIELDS)


@pytest.mark.parametrize("each", fields(Settings), ids=lambda each: each.name)
def test_what_is_offered_can_be_chosen(each: Field[Any]) -> None:
    for value in option_of(each).choices:
        assert getattr(make_settings({each.name: value}), each.name) == value


def test_sections_are_those_that_options_stand_in() -> None:
    used = {option_of(each).section for each in FIELDS}
    assert used == {"", *SECTIONS}
    context = click.Context(app.commands["analyze"], info_name="analyze")
    shown = app.commands["analyze"].get_help(context)
    places = [shown.index(f"\n{title}:\n") for title in ("Options", *SECTIONS)]
    assert places == sorted(places)
