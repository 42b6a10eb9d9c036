"""Models on several processes: which process records, and gathering the parts of a model.

Copies of a model (DDP) are the same on every process, so rank 0 records and nothing is exchanged.
Of a sharded model (FSDP), every process holds a part, so all processes must take part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lcray.checkpoints import naming
from lcray.checkpoints.snapshot import Contents
from lcray.errors import RecorderError

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def rank() -> int:
    """The rank of this process; 0 if there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is under FSDP: wrapped by it, or with DTensors as parameters.

    Raises:
        RecorderError: the wrapper hides the parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrapped = [part for part in model.modules() if isinstance(part, FullyShardedDataParallel)]
    if any(not part._use_orig_params for part in wrapped):
        raise RecorderError(
            "the model is under FSDP with use_orig_params=False, which hides its parameters; "
            "pass use_orig_params=True, or use fully_shard"
        )
    return bool(wrapped) or any(isinstance(tensor, DTensor) for tensor in model.parameters())


class Gathered:
    """The tensors of a sharded model, whole and on the CPU of rank 0.

    Every method that gathers is a collective: all processes must call it at the same step.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        # Known from the shards: after gathering, each name has a tensor of its own.
        named = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {_plain(name): tensor for name, tensor in named.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the state dict, by name, on rank 0. Collective."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # CPU to CPU would copy nothing, and FSDP would return memory that it frees later.
        away = any(tensor.device.type != "cpu" for tensor in self._parameters.values())
        options = StateDictOptions(full_state_dict=True, cpu_offload=away)
        state = get_model_state_dict(self._model, options=options)
        found: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            shard = self._parameters.get(name)
            known = name if shard is None else first.setdefault(id(shard), name)
            found[name] = found.get(known, value)
            if shard is not None:
                found[name].requires_grad_(shard.requires_grad)
        return found

    def contents(self) -> Contents:
        """The contents to store, on rank 0. Collective."""
        tensors = self.tensors()
        parameters = frozenset(name for name in tensors if name in self._parameters)
        return Contents(tensors, parameters, frozenset(tensors))


def agree_on_step(model: nn.Module, step: int | None) -> int:
    """Rank 0's step, on every rank of a sharded model; `step` is rank 0's, None if it failed.

    Raises:
        RecorderError: rank 0 could not begin (raised on the other ranks).
    """
    device = next(model.parameters()).device
    shared = torch.tensor([-1 if step is None else step], device=device)
    dist.broadcast(shared, src=0)
    agreed = int(shared.item())
    if agreed < 0 and rank():
        raise RecorderError("the recorder could not begin on rank 0; see the error there")
    return agreed


def _plain(name: str) -> str:
    kept = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return next(iter(naming.canonical_names([kept]).values()))
