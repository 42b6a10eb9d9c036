"""Finding what can be converted: files of torch.save, and distributed checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcray.checkpoints import naming
from lcray.errors import CheckpointError

_METADATA = ".metadata"  # of a directory that torch.distributed.checkpoint wrote


@dataclass(frozen=True)
class Source:
    """One checkpoint: a file, or (`distributed`) a directory of torch.distributed.checkpoint."""

    path: Path
    distributed: bool

    @property
    def named_step(self) -> int | None:
        """The step in the name; for `checkpoint-500/pytorch_model.bin`, in the folder's name."""
        name = self.path.name
        if name in naming.MODEL_PICKLES:
            name = self.path.parent.name
        return naming.parse_step(name)


def find_sources(root: Path) -> tuple[Source, ...]:
    """The checkpoints at `root`: itself, or the checkpoints in that directory.

    Raises:
        CheckpointError: nothing is there, or nothing that can be converted.
    """
    if not root.exists():
        raise CheckpointError(f"{root}: not found; give a checkpoint or a directory of them")
    if not root.is_dir():
        if not root.is_file():
            raise CheckpointError(f"{root}: not a regular file")
        if not naming.is_pickled_weights(root.name):
            known = ", ".join(naming.PICKLED)
            raise CheckpointError(f"{root}: no checkpoint of torch.save (one of {known})")
        return (Source(root, False),)
    if (root / _METADATA).is_file():
        return (Source(root, True),)
    found = [source for path in sorted(root.iterdir()) if (source := _source(path)) is not None]
    if not found:
        raise CheckpointError(
            f"{root}: no .pt, .pth, .bin or .ckpt files, and no distributed checkpoints; runs of "
            "safetensors are read as they are"
        )
    return tuple(found)


def _source(path: Path) -> Source | None:
    if naming.is_ignored(path.name):
        return None
    if path.is_file():
        return Source(path, False) if naming.is_pickled_weights(path.name) else None
    if not path.is_dir():
        return None
    if (path / _METADATA).is_file():
        return Source(path, True)
    inner = [path / name for name in naming.MODEL_PICKLES if (path / name).is_file()]
    return Source(inner[0], False) if inner else None
