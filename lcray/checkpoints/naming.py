"""The meaning of file and tensor names: the step in a path, and tensor names without wrappers.

Pure functions on strings; none of them touches the file system.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable

from lcray.errors import CheckpointError
from lcray.storage.json_types import LIMIT
from lcray.storage.numbers import whole_number

_INTEGER = re.compile(r"([0-9]+)")
_SHARD = re.compile(r"-\d+-of-\d+$")
# Where a name holds several integers, the integer after such a word is the step; words of the first
# line win over words of the second ("epoch=3-step=500" is step 500).
_STEP_WORDS = (
    re.compile(r"(?:step|steps|iter|iteration|iterations|update|updates)[-_.=]*([0-9]+)", re.I),
    re.compile(r"(?:checkpoint|ckpt|epoch)[-_.=]*([0-9]+)", re.I),
)
# Signs that digits are part of another number: a sign, a fraction, an exponent, thousands.
_SIGNED = re.compile(r"(?:(?:^|[\W_])-|[+\u2212]|[0-9][.,]|[0-9][eE][+-]?)$")
_CONTINUED = re.compile(r"[.,][0-9]|[eE][+-]?[0-9]|[kKmM](?![A-Za-z0-9])")
_NOT_A_MODEL = re.compile(
    r"(?:^|[-_.])(?:optimizer|optim|scheduler|scaler|rng|trainer|training)(?:$|[-_.=\d])", re.I
)
SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
MODEL_PICKLES = ("pytorch_model.bin", "model.pt")  # in the folder of a step
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def stem(name: str) -> str:
    """`name` without ``.safetensors`` or ``.safetensors.index.json``."""
    return name.removesuffix(INDEX).removesuffix(SAFETENSORS)


def is_ignored(name: str) -> bool:
    """Whether a directory entry is hidden, temporary or still being written."""
    lowered = name.lower()
    return name.startswith(".") or ".tmp" in lowered or lowered.startswith("tmp")


def is_weights(name: str) -> bool:
    """Whether a file name may hold a whole model: not a shard, optimizer state or temporary."""
    if is_ignored(name) or not name.endswith((SAFETENSORS, INDEX)):
        return False
    base = stem(name)
    return not _SHARD.search(base) and not _NOT_A_MODEL.search(base)


def is_pickled_weights(name: str) -> bool:
    """Whether a file name may hold a model of torch.save: not optimizer state, not a shard."""
    base, suffix = os.path.splitext(name)
    if is_ignored(name) or suffix not in PICKLED:
        return False
    return not _SHARD.search(base) and not _NOT_A_MODEL.search(base)


def is_shard_of(name: str, index_name: str) -> bool:
    """Whether `name` is one of the shards that belong to ``<base>.safetensors.index.json``."""
    base = stem(index_name)
    rest = stem(name).removeprefix(base)
    return name.endswith(SAFETENSORS) and name.startswith(base) and bool(_SHARD.fullmatch(rest))


def parse_step(name: str) -> int | None:
    """The step in one component of a path, or None if it holds no integer.

    A single integer in the digits 0 to 9 is the step. Of several integers, it is the one after
    ``step``, ``iter`` or ``update``, or else the one after ``checkpoint``, ``ckpt`` or ``epoch``.

    Raises:
        CheckpointError: several integers and no rule that chooses one, or digits that are part of
            another number, as in ``step-7.5``, ``step--7``, ``step-1e3`` and ``step-10k``.
    """
    base = stem(name)
    integers = list(_INTEGER.finditer(base))
    if not integers:
        if any(character.isdecimal() for character in base):
            raise _no_step(name, "is not written in the digits 0 to 9")
        return None
    if len(integers) == 1:
        return _step(name, base, integers[0])
    for words in _STEP_WORDS:
        found = list(words.finditer(base))
        if len(found) == 1:
            return _step(name, base, found[0])
    raise CheckpointError(
        f"{name}: cannot tell which of {', '.join(match[1] for match in integers)} is the step; "
        f"rename it, e.g. to step-{integers[-1][1]}.safetensors"
    )


def _step(name: str, base: str, found: re.Match[str]) -> int:
    """The integer that was `found` in `base`, unless it is part of another number."""
    start, stop = found.span(1)
    before, after = base[:start], base[stop:]
    if _SIGNED.search(before) or _CONTINUED.match(after):
        raise _no_step(name, "has a sign, a fraction, an exponent or a letter for thousands")
    if before[-1:].isdigit() or after[:1].isdigit():  # neighbouring digits of another script
        raise _no_step(name, "is not written in the digits 0 to 9")
    step = whole_number(found[1])
    assert step is not None
    if step == LIMIT:
        raise _no_step(name, "is too large, and steps end at 2**63")
    return step


def _no_step(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: its number {why}; a step must be a whole number: rename it, or move it away"
    )


def matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern`, or matches it as in a shell (``conv*``)."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """Tensor names without the prefixes that wrappers add: ``{key: canonical}``, in `keys`' order.

    ``_orig_mod`` (torch.compile) is removed at any place in the dotted path. A leading ``module``
    (data parallel wrappers) is removed only when **all** keys have it, so a submodule that is named
    ``module`` survives. This is repeated, so that a wrapped and a bare model get the same names.
    Applying it twice changes nothing.

    Raises:
        CheckpointError: two keys become the same name.
    """
    names = {key: ".".join(part for part in key.split(".") if part != "_orig_mod") for key in keys}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    if len(set(names.values())) != len(names):
        seen: dict[str, str] = {}
        for key, name in names.items():
            if name in seen:
                raise CheckpointError(
                    f"tensors {seen[name]!r} and {key!r} are both {name!r} without wrapper "
                    "prefixes; keep one of them"
                )
            seen[name] = key
    return names
