"""BatchNorm as a function of the weights alone, in one of two modes.

``running``: the statistics stored with the checkpoint, evaluated from the formula

    y = (x − mean) / sqrt(var + eps) · weight + bias

since torch's own kernel has no gradients for mean and var, which also move along the path.
``batch``: the statistics of the evaluation batch, as in [LCA]. Neither mode updates running
statistics. Models stay in evaluation mode, so dropout is off. InstanceNorm never depends on other
samples: in both modes it uses its running statistics, if it has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lcray.errors import TaskError
from lcray.tasks.model.replacements import Replacements


class Normalization(Replacements):
    """While active, `torch.nn.functional.batch_norm` and `instance_norm` follow `mode`.

    Attributes:
        used: whether either function has been called yet.

    Args:
        mode: ``running`` or ``batch``.
        fixed_batches: whether batches are part of the plan, so that their statistics may be used.
        formula: whether running statistics always use the formula; otherwise only statistics that
            require gradients use it, and torch's own kernel takes the others.
    """

    def __init__(self, mode: str, *, fixed_batches: bool, formula: bool = True) -> None:
        super().__init__({F.batch_norm: self._batch_norm, F.instance_norm: self._instance_norm})
        self._batch, self._fixed, self._formula = mode == "batch", fixed_batches, formula
        self.used = False

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        self.used = True
        if self._batch or training or running_mean is None or running_var is None:
            if not self._fixed:
                raise TaskError(
                    "model: normalises by batch statistics outside of torch's BatchNorm modules, "
                    "or switches to training mode; analyze with batch_norm='batch' (--batch-norm "
                    "batch), or declare that batches are part of the loss: Task(batch_loss=True)"
                )
            return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        if self._needs_formula(running_mean, running_var):
            return _normalize(input, running_mean, running_var, weight, bias, eps)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        self.used = True
        if use_input_stats or running_mean is None or running_var is None:
            return F.instance_norm(input, None, None, weight, bias, True, 0.0, eps)
        if self._needs_formula(running_mean, running_var):
            return _normalize(input, running_mean, running_var, weight, bias, eps)
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)

    def _needs_formula(self, mean: Tensor, var: Tensor) -> bool:
        return self._formula or mean.requires_grad or var.requires_grad


def _normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1] + [1] * (x.dim() - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def depends_on_batches(model: nn.Module, mode: str) -> bool:
    """Whether the loss of an item depends on the batch it is in, so that batches must be fixed.

    This is so with batch statistics, and always for BatchNorm layers without running statistics.
    """
    return mode == "batch" or any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


def may_normalize(model: nn.Module) -> bool:
    """Whether the model may use running statistics that move along the path.

    These are the statistics of torch's BatchNorm and InstanceNorm, and pairs of saved float buffers
    of one axis, which a module may pass to the functional forms itself. The answer depends on the
    model alone, not on which of its modules have been called so far, since they may be gated.
    """
    return any(
        isinstance(module, _NormBase) or _holds_statistics(module) for module in model.modules()
    )


def _holds_statistics(module: nn.Module) -> bool:
    shapes = [
        buffer.shape
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
        and buffer.is_floating_point()
        and buffer.dim() == 1
    ]
    return len(set(shapes)) < len(shapes)
