"""Squared norms of the scores of single samples, layer by layer.

Legend: B samples per batch, n items, M trained layers.

The score of a sample is G = Σ √w ∂ℓ/∂θ over its items. For layers whose use is known, its square is
computed in closed form (`lcray.allocation.fisher.ghost`). The others go through `torch.func`,
several samples at a time, or, if a model cannot be vectorised, one sample after the other. Each
layer's way is decided once, by comparing gradients of single samples at a point that a fixed seed
draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcray.allocation.fisher.ghost import ROOM, Watch
from lcray.allocation.gradient import GradientEngine
from lcray.errors import TaskError, brief
from lcray.tasks.data.pytree import map_tensors
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.batch_norm import Normalization
from lcray.tasks.model.flat import FlatModel

Loss = Callable[[nn.Module, Any], Any]
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-7}  # relative, of squared norms
_NOISE, _SEED = 0.1, 20190905


@dataclass(frozen=True)
class BatchScores:
    """The scores of a batch.

    Attributes:
        squares: |G|² for each sample and layer, [B, M] float64 on the CPU.
        weights: Σ w of each sample's items, [B] float64 on the CPU.
        n_items: items whose weight is not zero.
        output: the model's output.
    """

    squares: Tensor
    weights: Tensor
    n_items: int
    output: Any


class SampleScores:
    """Computes the squared scores of the samples of a split.

    Attributes:
        numbers: of the trained layers, [M].
        closed: numbers of the layers in closed form.
        vectorised: whether the others go through `torch.func.vmap`.

    Args:
        flat: the model; its point is moved.
        engine: gives the checked losses of a batch.
        loss: of the task.
        split: a batch of it decides each layer's way.

    Raises:
        TaskError: if batches cannot be cut into samples.
    """

    def __init__(
        self, flat: FlatModel, engine: GradientEngine, loss: Loss, split: SplitData
    ) -> None:
        self._flat, self._engine, self._loss = flat, engine, loss
        tensors = flat.trained()
        self.numbers = tuple(tensors)
        self._tensors, self._ids = tensors, {id(t): n for n, t in tensors.items()}
        self.closed: frozenset[int] = frozenset(tensors)
        self.vectorised = True
        self._decide(split)

    def of_batch(self, split: SplitData, index: int, batch: Any) -> BatchScores:
        """The squared scores at the current point.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        size = split.batch_sizes[index]
        with self._normalized(), torch.enable_grad():
            found, weights, n_items, output = self._in_closed_form(split, index, batch)
            others = [n for n in self.numbers if n not in found]
            if others:
                way = self._vectorised if self.vectorised else self._one_by_one
                found |= way(batch, size, others)
        self._flat.check_tied()
        columns = [found[n].cpu() for n in self.numbers]
        return BatchScores(torch.stack(columns, 1), weights.cpu(), n_items, output)

    def _normalized(self) -> Normalization:
        return Normalization("running", fixed_batches=False)

    def _in_closed_form(
        self, split: SplitData, index: int, batch: Any
    ) -> tuple[dict[int, Tensor], Tensor, int, Any]:
        size = split.batch_sizes[index]
        outputs: list[Any] = []
        watch = Watch({i: n for i, n in self._ids.items() if n in self.closed}, size)
        hook = self._flat.model.register_forward_hook(lambda m, a, out: outputs.append(out))
        try:
            with watch:
                losses, weights = self._engine.item_losses(split, index, batch)
        finally:
            hook.remove()
        if not len(losses) or len(losses) % size:
            raise TaskError(
                f"task loss on split {split.name!r}, batch {index}: {len(losses)} items of {size} "
                "samples; Fisher information needs equally many per sample (weight 0 for padding)"
            )
        gradients: tuple[Tensor | None, ...] = ()
        if watch.edges:
            total = _total(losses, weights)
            gradients = torch.autograd.grad(total, watch.edges, allow_unused=True)
        found = {n: watch.squares(n, gradients) for n in self.closed}
        mass = torch.ones_like(losses) if weights is None else weights
        return (
            {n: values for n, values in found.items() if values is not None},
            mass.detach().double().reshape(size, -1).sum(1),
            int((mass > 0).sum()),
            outputs[0] if len(outputs) == 1 else None,
        )

    def _one_by_one(self, batch: Any, size: int, numbers: list[int]) -> dict[int, Tensor]:
        tensors = [self._tensors[n] for n in numbers]
        rows = []
        for number in range(size):
            total = _total(*_pair(self._loss(self._flat.model, _sample(batch, size, number))))
            found = torch.autograd.grad(total, tensors, allow_unused=True)
            rows.append([_squared(g, total) for g in found])
        columns = zip(*rows, strict=True)
        return {n: torch.stack(column) for n, column in zip(numbers, columns, strict=True)}

    def _vectorised(self, batch: Any, size: int, numbers: list[int]) -> dict[int, Tensor]:
        keys = {key: n for key, n in self._keys().items() if n in numbers}
        values = {key: self._tensors[n].detach() for key, n in keys.items()}
        whole = _Whole(self._flat.model, self._loss)
        leaves = _tensors(batch)
        cut = [bool(t.dim()) and len(t) == size for t in leaves]

        def total(parameters: dict[str, Tensor], *parts: Tensor) -> Tensor:
            rows = (p[None] if c else p for p, c in zip(parts, cut, strict=True))
            sample = map_tensors(lambda tensor: next(rows), batch)
            result = torch.func.functional_call(whole, parameters, (sample,))
            return _total(*_pair(result))

        axes = (None, *(0 if c else None for c in cut))
        function = torch.func.vmap(torch.func.grad(total), axes, randomness="error")
        one = sum(value.nbytes for value in values.values())
        step = max(1, min(size, ROOM // max(1, 2 * one)))
        found: dict[int, list[Tensor]] = {n: [] for n in numbers}
        for start in range(0, size, step):
            part = slice(start, start + step)
            pieces = (t[part] if c else t for t, c in zip(leaves, cut, strict=True))
            with torch.no_grad():  # no gradient beyond the function's own
                gradients = function(values, *pieces)
            for key, gradient in gradients.items():
                squares = gradient.double().square()
                found[keys[key]].append(squares.reshape(len(squares), -1).sum(1))
        return {n: torch.cat(parts) for n, parts in found.items()}

    def _keys(self) -> dict[str, int]:
        """The name in torch of each trained tensor, with the number of its layer."""
        named = self._flat.model.named_parameters(prefix="model")
        return {key: self._ids[id(t)] for key, t in named if id(t) in self._ids}

    def _decide(self, split: SplitData) -> None:
        """Find the ways that agree with gradients of single samples, at a point of its own."""
        self._perturb()
        with self._normalized(), torch.enable_grad():
            index, tried = self._with_weight(split)
            batch, size = split.batches[index], split.batch_sizes[index]
            _check_samples(self._flat.model, self._loss, batch, size, tried, split.name)
            rows = [self._one_by_one(_sample(batch, size, i), 1, [*self.numbers]) for i in tried]
            expected = {n: torch.cat([row[n] for row in rows]) for n in self.numbers}
            squares, *_ = self._in_closed_form(split, index, batch)
            good = [n for n, s in squares.items() if self._agree(s[tried], expected[n])]
            self.closed = frozenset(good)
            others = [n for n in self.numbers if n not in self.closed]
            try:
                found = self._vectorised(batch, size, others) if others else {}
                self.vectorised = all(self._agree(s[tried], expected[n]) for n, s in found.items())
            except Exception:  # a model may do anything that cannot be vectorised
                self.vectorised = False

    def _with_weight(self, split: SplitData) -> tuple[int, list[int]]:
        """The first batch with weight, and three of its samples with weight."""
        for index, size in enumerate(split.batch_sizes):
            _, weights = self._engine.item_losses(split, index, split.batches[index])
            mass = torch.ones(size)
            if weights is not None and len(weights) and not len(weights) % size:
                mass = weights.reshape(size, -1).sum(1)
            found = mass.nonzero()[:, 0].tolist()
            if found:
                return index, sorted({found[0], found[len(found) // 2], found[-1]})
        return 0, [0]

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = _TOLERANCE[self._flat.theta.dtype]
        return bool(((found - expected).abs() <= tolerance * expected.abs().max()).all())

    def _perturb(self) -> None:
        """Move trained layers away from points with zero gradients, such as an initial zero."""
        generator = torch.Generator().manual_seed(_SEED)
        for number in self.numbers:
            part = self._flat.theta[self._flat.slices[number]]
            noise = torch.randn(len(part), generator=generator).to(part)
            size = part.double().square().mean().sqrt().to(part) if len(part) else part.sum()
            part.add_(noise * (_NOISE * size + 1e-2))


class _Whole(nn.Module):
    """The model with its loss, so that `functional_call` can take both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Any) -> Any:
        return self._loss(self.model, batch)


def _total(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Σ √w ℓ; a loss without weight does not count, even if it is not finite."""
    if weights is None:
        return losses.sum()
    weights = weights.detach().to(losses.dtype)
    return (torch.where(weights > 0, losses, 0) * weights.sqrt()).sum()


def _pair(result: Any) -> tuple[Tensor, Tensor | None]:
    return result if isinstance(result, tuple) else (result, None)


def _squared(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return gradient.to_dense().double().square().sum()


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def _sample(batch: Any, size: int, number: int) -> Any:
    """A batch of one of its samples."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[number : number + 1] if tensor.dim() and len(tensor) == size else tensor

    return map_tensors(cut, batch)


def _check_samples(
    model: nn.Module, loss: Loss, batch: Any, size: int, tried: list[int], split: str
) -> None:
    """Refuse batches that are not rows of samples: a loss must depend on its sample alone."""
    where = f"task split {split!r}: Fisher information takes single samples of a batch"
    try:
        with torch.no_grad():
            whole, _ = _pair(loss(model, batch))
            parts = [_pair(loss(model, _sample(batch, size, i)))[0] for i in tried]
    except Exception as error:
        raise TaskError(f"{where}, and the loss fails on one: {brief(error)}") from error
    tolerance = _TOLERANCE[whole.dtype]
    same = len(whole) == size * len(parts[0]) and torch.allclose(
        torch.stack(parts),
        whole.reshape(size, -1)[tried],
        rtol=tolerance,
        atol=tolerance * float(whole.abs().mean()),
    )
    if not same:
        raise TaskError(
            f"{where}, but their losses differ from the batch's; every tensor of a batch must "
            "have the samples along its first axis, and no sample may depend on another"
        )
