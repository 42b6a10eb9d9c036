"""JSON values as frozen dataclasses; every value has exactly the type that its field declares."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
#: The largest whole number that Arrow and torch can hold.
LIMIT = 2**63
#: The largest number of axes of a tensor: NumPy's limit, and torch's where it iterates elements.
MAX_AXES = 64


def build(kind: type[_T], data: object) -> _T:
    """The dataclass `kind` from a JSON object; fields with defaults may be left out.

    Lists become tuples, and objects become dataclasses where a field is one. Whole numbers are
    accepted for float fields. Nothing else is converted: a bool is not an integer, a string is
    not a number.

    Raises:
        TypeError: for a value of the wrong type, an unknown field or a missing field.
        ValueError: for a number that is not finite, a whole number beyond 64 bits, or a string that
            is not Unicode.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"not an object where {kind.__name__} should be")
    hints = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
    for name in data:
        if name not in hints:
            raise TypeError(f"{kind.__name__} has no field {name!r}")
    return kind(**{n: value_of(hints[n], v, f"{kind.__name__}.{n}") for n, v in data.items()})


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def value_of(hint: Any, value: object, where: str) -> Any:
    """`value` if it has the type `hint`; raises as `build` does, calling the value `where`."""
    options = get_args(hint)
    if NoneType in options:
        if value is None:
            return None
        (hint,) = (option for option in options if option is not NoneType)
        options = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} is not a list")
        return tuple(value_of(options[0], item, where) for item in value)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} is not an object")
        key, each = options
        return {value_of(key, k, where): value_of(each, v, where) for k, v in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value)
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise TypeError(f"{where} is no {hint.__name__}")
    _check_range(value, where)
    return value


def _check_range(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is not finite")
    if isinstance(value, int) and not -LIMIT <= value < LIMIT:
        raise ValueError(f"{where} does not fit into 64 bits")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{where} is not Unicode")
