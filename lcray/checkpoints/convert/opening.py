"""Reading checkpoints of other programs. The only module that calls torch.load.

A file of torch.save is a pickle, and so is the index of a distributed checkpoint: unpickling can
run any code that its author put in. torch reads plain tensors, numbers and containers without
running anything (``weights_only=True``), and without trust lcray reads nothing else.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcray.checkpoints import header, naming
from lcray.checkpoints.convert.bounds import check_file, check_tensors
from lcray.checkpoints.convert.sources import Source
from lcray.errors import CheckpointError, one_line, suggest

_MODELS = ("state_dict", "model_state_dict", "model", "module")
_STEPS = ("global_step", "step", "iteration")
_TRUST = (
    "unpickling it can run any code that its author put in: if you trust its author, pass "
    "--trust-pickle (trust_pickle=True)"
)


@dataclass(frozen=True)
class Saved:
    """One checkpoint in memory: its tensors by canonical name, and its step."""

    tensors: dict[str, Tensor]
    step: int


def read_source(source: Source, *, key: str | None, prefix: str, trust: bool) -> Saved:
    """Read one checkpoint.

    Args:
        source: the checkpoint.
        key: the entry of the file that holds the model; None takes a usual one or the file itself.
        prefix: keep only the tensors whose names begin with it, and remove it from their names.
        trust: unpickle files that cannot be read otherwise.

    Raises:
        CheckpointError: it cannot be read, needs trust, or holds no model or no step.
    """
    found, step = _distributed(source, trust) if source.distributed else _file(source, key, trust)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    kept = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    if not kept:
        begin = ", ".join(sorted(tensors)[:3]) or "there are none"
        raise CheckpointError(f"{source.path}: no tensors under {prefix!r}; they begin: {begin}")
    if step is None:
        step = source.named_step
    if step is None:
        raise CheckpointError(
            f"{source.path}: neither its content nor its name holds a step; rename it, e.g. to "
            f"step-10{source.path.suffix}"
        )
    if not 0 <= step < 2**63:
        raise CheckpointError(f"{source.path}: claims to be step {step}; steps are 0 to 2**63")
    names = naming.canonical_names(kept)
    for name in names.values():
        if not header.can_name(name):
            raise CheckpointError(
                f"{source.path}: safetensors cannot hold a tensor that is called {name!r}; save it "
                "under another name"
            )
    found = _tied({names[name]: value for name, value in kept.items()})
    if not source.distributed:
        check_tensors(source.path, found)
    return Saved(found, step)


def _file(source: Source, key: str | None, trust: bool) -> tuple[Mapping[str, Any], int | None]:
    content = _load(source, trust)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"{source.path}: holds a {kind}, not tensors by name")
    model = _model_in(source, content, key)
    return model, _step_in(content, model)


def _step_in(content: Mapping[str, Any], model: Mapping[str, Any]) -> int | None:
    """The step that a file names beside its model; a tensor of the model is not a step."""
    for name in _STEPS:
        value = content.get(name)
        if content is not model and isinstance(value, Tensor) and _is_integer(value):
            value = value.item()
        if type(value) is int:  # not a bool
            return value
    return None


def _is_integer(value: Tensor) -> bool:
    plain = value.layout == torch.strided and not value.is_meta and value.dim() == 0
    return plain and not (value.is_floating_point() or value.is_complex() or value.is_quantized)


def _load(source: Source, trust: bool) -> Any:
    _check(source, trust)
    try:
        return torch.load(source.path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{source.path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError" or "Weights only" not in str(error):
            raise _damaged(source, error) from error
        if not trust:
            raise CheckpointError(
                f"{source.path}: holds more than tensors, numbers and containers, or is damaged; "
                + _TRUST
            ) from error
    try:
        return torch.load(source.path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _damaged(source, error) from error


def _check(source: Source, trust: bool) -> None:
    """Refuse a file that torch.load would give to another reader, or that needs too much memory."""
    _refuse_other_formats(source.path)
    try:
        damage = check_file(source.path, trust=trust)
    except OSError as error:
        raise CheckpointError(f"{source.path}: cannot be read: {error.strerror}") from error
    if damage is not None:
        raise _damaged(source, ValueError(damage))


def _refuse_other_formats(path: Path) -> None:
    """Refuse a file that torch.load would give to another reader, with or without trust."""
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: is a TorchScript archive, a program that is not run: if you trust it, "
            "save what torch.jit.load(FILE).state_dict() gives, with torch.save"
        )
    if _is_tar(path):
        raise CheckpointError(
            f"{path}: is a tar file of an early version of torch, and is not unpickled here: if "
            "you trust it, save what torch.load(FILE, weights_only=False) gives, with torch.save"
        )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # torch.load reports the fault
        return False


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:") as archive:
            return archive.next() is not None  # zeros alone also count as an empty archive
    except Exception:  # as above
        return False


def _model_in(source: Source, content: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            known = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
            raise CheckpointError(f"{source.path}: " + suggest(key, known, "key"))
        return _by_name(source, content[key])
    inner = [name for name in _MODELS if isinstance(content.get(name), Mapping)]
    if inner:
        return _by_name(source, content[inner[0]])
    if any(isinstance(value, Tensor) for value in content.values()):
        return _by_name(source, content)
    held = ", ".join(str(name) for name, v in content.items() if isinstance(v, Mapping))
    raise CheckpointError(
        f"{source.path}: no model in it under a usual name; name its key with --key, one of: "
        + (held or "none holds tensors by name")
    )


def _by_name(source: Source, model: Mapping[Any, Any]) -> Mapping[str, Any]:
    if not all(isinstance(name, str) for name in model):
        raise CheckpointError(f"{source.path}: its tensors have names that are not text")
    return model


def _distributed(source: Source, trust: bool) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of a torch.distributed.checkpoint directory; its index is a pickle."""
    if not trust:
        raise CheckpointError(
            f"{source.path}: is a distributed checkpoint, whose .metadata is a pickle: {_TRUST}"
        )
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = FileSystemReader(source.path)
        known = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in known.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(state, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise _damaged(source, error) from error
    return state, None


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where tensors that share all of their memory are one object."""
    first: dict[tuple[Any, ...], Tensor] = {}
    for name, value in tensors.items():
        if value.layout == torch.strided and value.numel():
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            tensors[name] = first.setdefault(place, value)
    return tensors


def _damaged(source: Source, error: Exception) -> CheckpointError:
    said = str(error).strip().partition("\n")[0].partition(". ")[0]
    why = one_line(said)[:200] or type(error).__name__
    return CheckpointError(f"{source.path}: cannot be read: {why}; save it again, or leave it out")
