"""An independent, slow twin of the allocation: float64, plain autograd, one sample at a time.

It shares no code with the library. Rules are written down from textbooks (Abramowitz & Stegun,
25.4: trapezoid, Simpson, Legendre and Lobatto nodes on [-1, 1]); the model is freshly built and
called with `torch.func.functional_call`; BatchNorm is replaced by its formula; sums are plain.

    LC_i = (b_i - a_i) · Σ_k w_k g_i(a + s_k (b - a)),     L = Σ_items w ℓ / Σ_items w
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

State = Mapping[str, Tensor]


def sign(value: float) -> int:
    """0 for what is no number, too."""
    return int(value > 0) - int(value < 0)


def _from_symmetric(nodes: Sequence[float], weights: Sequence[float]) -> Any:
    """A rule on [-1, 1] moved to [0, 1]."""
    return [(x + 1) / 2 for x in nodes], [w / 2 for w in weights]


_R5, _R35 = math.sqrt(1 / 5), math.sqrt(3 / 5)
_SIMPSON = _from_symmetric([-1, 0, 1], [1 / 3, 4 / 3, 1 / 3])
_LOBATTO = _from_symmetric([-1, -_R5, _R5, 1], [1 / 6, 5 / 6, 5 / 6, 1 / 6])
_LEGENDRE_2 = _from_symmetric([-math.sqrt(1 / 3), math.sqrt(1 / 3)], [1.0, 1.0])
_LEGENDRE = _from_symmetric([-_R35, 0, _R35], [5 / 9, 8 / 9, 5 / 9])

#: name: (nodes, weights, weights of the lower rule on the same nodes or None)
RULES: dict[str, tuple[list[float], list[float], list[float] | None]] = {
    "left": ([0.0], [1.0], None),
    "midpoint": ([0.5], [1.0], None),
    "trapezoid": ([0.0, 1.0], [0.5, 0.5], [1.0, 0.0]),
    "simpson": (*_SIMPSON, [0.5, 0.0, 0.5]),
    "gauss-lobatto": (*_LOBATTO, [0.5, 0.0, 0.0, 0.5]),
    "gauss-2": (*_LEGENDRE_2, None),
    "gauss": (*_LEGENDRE, [0.0, 1.0, 0.0]),
    # Composite Simpson is 1 4 2 4 1 over 12; its lower rule is Simpson on one panel: 1 0 4 0 1.
    "simpson*2": (
        [0.0, 0.25, 0.5, 0.75, 1.0],
        [v / 12 for v in (1, 4, 2, 4, 1)],
        [v / 6 for v in (1, 0, 4, 0, 1)],
    ),
    "trapezoid*4": (
        [0.0, 0.25, 0.5, 0.75, 1.0],
        [v / 8 for v in (1, 2, 2, 2, 1)],
        [v / 4 for v in (1, 1, 1, 1, 0)],
    ),
}


class Norm(nn.Module):
    """BatchNorm from its formula, with the names of torch's module."""

    def __init__(self, original: nn.Module, mode: str) -> None:
        super().__init__()
        self.mode, self.eps = mode, original.eps
        for name, value in original.named_parameters(recurse=False):
            self.register_parameter(name, value)
        for name, value in original.named_buffers(recurse=False):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, x.shape[1]] + [1] * (x.dim() - 2)
        if self.mode == "batch":
            over = [d for d in range(x.dim()) if d != 1]
            count = x.numel() // x.shape[1]
            mean = x.sum(over) / count
            var = ((x - mean.view(shape)) ** 2).sum(over) / count
        else:
            mean, var = self.running_mean, self.running_var
        y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


def build(make: Callable[[], nn.Module], mode: str) -> nn.Module:
    """The model in float64 and evaluation mode, its BatchNorm layers replaced."""
    model = make().double().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, Norm(child, mode).eval())
    return model


@dataclass
class Point:
    """Loss and gradients at one point; `groups` are gradients of the groups' own mean losses."""

    loss: float
    gradient: dict[str, Tensor]
    group_weights: dict[int, float] = field(default_factory=dict)
    groups: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Interval:
    """What the twin finds for one interval, by the name of the layer."""

    loss_start: float
    loss_end: float
    lc: dict[str, Tensor]
    error: dict[str, float] | None
    first_order: dict[str, float] | None
    start_gradient: dict[str, Tensor]
    groups: dict[int, dict[str, float]]
    group_weights: dict[int, float]

    @property
    def total(self) -> float:
        return math.fsum(v for t in self.lc.values() for v in t.reshape(-1).tolist())

    @property
    def scale(self) -> float:
        """Σ|LC|."""
        return math.fsum(abs(v) for t in self.lc.values() for v in t.reshape(-1).tolist())

    def layer(self, name: str) -> float:
        return math.fsum(self.lc[name].reshape(-1).tolist())


class Twin:
    """Evaluates a task slowly.

    Args:
        make: builds the model.
        loss: of the task.
        chunks: the data: one sample each, or the planned batches where they are part of the loss.
        groups: of the task, or None.
        mode: of BatchNorm.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        loss: Callable[[Any, Any], Any],
        chunks: Sequence[Any],
        groups: Callable[[Any], Tensor] | None = None,
        mode: str = "running",
    ) -> None:
        self.model = build(make, mode)
        self._loss, self._groups = loss, groups
        self._chunks = [_double(chunk) for chunk in chunks]
        tied = dict(self.model.named_parameters(remove_duplicate=False))
        first = dict(self.model.named_parameters())
        self.aliases = set(tied) - set(first)
        self.frozen = {name for name, value in first.items() if not value.requires_grad}
        self.parameters = list(first)
        stored = self.model.state_dict()
        self.layers = self.parameters + [
            name
            for name in stored
            if name not in first and name not in self.aliases and stored[name].is_floating_point()
        ]

    def point(self, state: State, moving: set[str]) -> Point:
        """Loss and gradients at `state`, for parameters and the `moving` buffers."""
        leaves = {}
        for name, value in state.items():
            if name not in self.aliases:
                leaf = value.detach().clone()
                leaves[name] = leaf.double() if leaf.is_floating_point() else leaf
        wanted = [n for n in self.layers if (n in moving or n in self.parameters)]
        wanted = [n for n in wanted if n not in self.frozen]
        for name in wanted:
            leaves[name].requires_grad_(True)

        def net(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, leaves, args, kwargs)

        losses: list[float] = []
        weights: list[float] = []
        total = {n: torch.zeros_like(leaves[n], requires_grad=False) for n in self.layers}
        by_group: dict[int, dict[str, Tensor]] = {}
        group_weights: dict[int, list[float]] = {}
        for chunk in self._chunks:
            found = self._loss(net, chunk)
            loss, weight = found if isinstance(found, tuple) else (found, torch.ones_like(found))
            labels = None if self._groups is None else self._groups(chunk)
            for i in range(len(loss)):
                w = float(weight[i])
                if w == 0.0:
                    continue
                losses.append(w * float(loss[i].detach()))
                weights.append(w)
                grads = torch.autograd.grad(
                    loss[i], [leaves[n] for n in wanted], retain_graph=True, allow_unused=True
                )
                for name, grad in zip(wanted, grads, strict=True):
                    if grad is None:
                        continue
                    total[name] += w * grad
                    if labels is not None:
                        sums = by_group.setdefault(int(labels[i]), {})
                        sums[name] = sums.get(name, 0) + w * grad
                if labels is not None:
                    group_weights.setdefault(int(labels[i]), []).append(w)
        mass = math.fsum(weights)
        shares = {g: math.fsum(values) for g, values in group_weights.items()}
        return Point(
            loss=math.fsum(losses) / mass,
            gradient={n: g / mass for n, g in total.items()},
            group_weights=shares,
            groups={k: {n: v / shares[k] for n, v in sums.items()} for k, sums in by_group.items()},
        )

    def interval(self, before: State, after: State, rule: str) -> Interval:
        """LC between two states by `rule`."""
        nodes, weights, embedded = RULES[rule]
        a = {n: before[n].double() for n in self.layers}
        b = {n: after[n].double() for n in self.layers}
        moved = {n: ~torch.eq(a[n], b[n]) for n in self.layers}
        delta = {n: torch.where(moved[n], b[n] - a[n], torch.zeros_like(a[n])) for n in self.layers}
        moving = {n for n in self.layers if n not in self.parameters and bool(moved[n].any())}

        def at(s: float) -> Point:
            if s == 1.0:
                return self.point(after, moving)
            here = {n: a[n] + s * delta[n] for n in self.layers}
            return self.point({**before, **here}, moving)

        start, end = at(0.0), at(1.0)
        points = [start if s == 0.0 else end if s == 1.0 else at(s) for s in nodes]

        def allocate(rule_weights: Sequence[float]) -> dict[str, Tensor]:
            sums = {n: torch.zeros_like(a[n]) for n in self.layers}
            for w, p in zip(rule_weights, points, strict=True):
                for n in self.layers:
                    sums[n] += w * p.gradient[n]
            return {n: sums[n] * delta[n] for n in self.layers}

        lc = allocate(weights)
        error = None
        if embedded is not None:
            lower = allocate(embedded)
            error = {n: abs(_sum(lc[n]) - _sum(lower[n])) for n in self.layers}
        groups = {}
        for g in sorted(start.group_weights):
            groups[g] = {
                n: math.fsum(
                    w * _sum(p.groups[g][n] * delta[n]) if n in p.groups[g] else 0.0
                    for w, p in zip(weights, points, strict=True)
                )
                for n in self.layers
            }
        return Interval(
            loss_start=start.loss,
            loss_end=end.loss,
            lc=lc,
            error=error,
            first_order=(
                {n: _sum(start.gradient[n] * delta[n]) for n in self.layers}
                if nodes[0] == 0.0
                else None
            ),
            start_gradient=start.gradient,
            groups=groups,
            group_weights=start.group_weights,
        )


def _sum(tensor: Tensor) -> float:
    return math.fsum(tensor.reshape(-1).tolist())


def _double(chunk: Any) -> Any:
    return tuple(part.double() if part.is_floating_point() else part for part in chunk)
