"""Models whose backward pass gives the derivative of the loss.

Training may want something else than the derivative. Hooks change gradients during the backward
pass, or update weights as soon as a gradient exists. Embeddings leave out the row of padding, or
divide gradients by how often a row is in the batch; with ``max_norm``, the forward pass writes
shorter rows into the weight. LC needs the derivative, and a loss that writes nothing. So hooks are
removed, and embeddings compute

    e(i) = W_i · min(1, max_norm / ‖W_i‖)

which has the same values as torch's embedding, at any W, and is a function of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.tasks.model.replacements import Replacements

_EPSILON = 1e-7  # what torch adds to the norms that it divides by


def use_derivatives(model: nn.Module) -> None:
    """Make the backward pass of the model the derivative; its losses do not change.

    Embeddings with ``max_norm`` are not changed if they have their own forward pass, or if their
    weight is used elsewhere: there, rows are shortened or not, depending on the batch.
    """
    _drop_hooks(model)
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.scale_grad_by_freq = False
        if not isinstance(module, nn.Embedding):
            continue
        if not _is_torchs(module):
            if module.padding_idx is not None:
                module.forward = partial(_with_padding, module.forward)  # type: ignore[method-assign]
            continue
        alone = uses.get(id(module._parameters.get("weight"))) == 1
        if alone if module.max_norm is not None else module.padding_idx is not None:
            module.forward = partial(_embed, module)  # type: ignore[method-assign]


def _drop_hooks(model: nn.Module) -> None:
    """Remove the hooks that were registered to change gradients, or to act on them."""
    for tensor in (*model.parameters(), *model.buffers()):
        for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks):
            if hooks:
                hooks.clear()
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()


def _is_torchs(module: nn.Embedding) -> bool:
    return type(module).forward is nn.Embedding.forward and "forward" not in module.__dict__


def _with_padding(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward pass with a gradient for the row of padding, as for any other row."""
    with Replacements({F.embedding: _without_padding}):
        return forward(*args, **kwargs)


def _without_padding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    return F.embedding(input, weight, None, *args, **kwargs)


def _embed(module: nn.Embedding, input: Tensor) -> Tensor:
    rows = F.embedding(input, module.weight, sparse=module.sparse)
    if module.max_norm is None:
        return rows
    norms = torch.linalg.vector_norm(rows, module.norm_type, dim=-1, keepdim=True)
    return torch.where(norms > module.max_norm, rows * (module.max_norm / (norms + _EPSILON)), rows)
