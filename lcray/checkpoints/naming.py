"""What file and tensor names mean: the step in a path, and tensor names without wrappers.

Pure functions on strings; nothing here touches the file system.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable

from lcray.errors import CheckpointError

_INTEGER = re.compile(r"\d+")
_SHARD = re.compile(r"-\d+-of-\d+$")
# Where a name holds several integers, the one after such a word is the step; words of the first
# line win over those of the second ("epoch=3-step=500" is step 500).
_STEP_WORDS = (
    re.compile(r"(?:step|steps|iter|iteration|iterations|update|updates)[-_.=]*(\d+)", re.I),
    re.compile(r"(?:checkpoint|ckpt|epoch)[-_.=]*(\d+)", re.I),
)
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
    """Whether a file name may hold a whole model: no shard, no optimizer state, not temporary."""
    if is_ignored(name) or not name.endswith((SAFETENSORS, INDEX)):
        return False
    base = stem(name)
    return not _SHARD.search(base) and not _NOT_A_MODEL.search(base)


def is_pickled_weights(name: str) -> bool:
    """Whether a file name may hold a model that torch.save wrote: no optimizer state, no shard."""
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
    """The step in one component of a path, or None where it holds no integer.

    One integer is the step. Of several, the one after ``step``, ``iter`` or ``update`` is; failing
    those, the one after ``checkpoint``, ``ckpt`` or ``epoch``.

    Raises:
        CheckpointError: several integers and no rule that chooses one.
    """
    base = stem(name)
    integers = _INTEGER.findall(base)
    if not integers:
        return None
    if len(integers) == 1:
        return int(integers[0])
    for words in _STEP_WORDS:
        found = words.findall(base)
        if len(found) == 1:
            return int(found[0])
    raise CheckpointError(
        f"{name}: cannot tell which of {', '.join(integers)} is the step; "
        f"rename it, e.g. to step-{integers[-1]}.safetensors"
    )


def matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern`, or matches it as a shell's file name would (``conv*``)."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """Tensor names without what wrappers add: ``{key: canonical}``, in the order of `keys`.

    ``_orig_mod`` (torch.compile) goes wherever it stands in the dotted path. A leading ``module``
    (data parallel wrappers) goes only when **all** keys have it, so a submodule that is called
    ``module`` survives; this repeats, so that a wrapped and a bare model agree. Applying it twice
    changes nothing.

    Raises:
        CheckpointError: two keys that become one name.
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
