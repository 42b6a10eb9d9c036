"""The full-batch loss and gradient at a point: the hot loop.

Legend: P elements, L layers, G groups, R replicates of a sample, D directions, n items per batch.

    L(θ) = Σ w ℓ(θ) / Σ w,        g(θ) = ∂L/∂θ

over every item of a split exactly once. The passes run in the compute dtype. Sums over batches are
in float64, in the order of the batches and of the parts that the plan defines, so a result is a
function of the point alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcray.allocation.partial_sums import Answer, Colleagues, PartSums, Request, Site, cut_parts
from lcray.allocation.path import Segment
from lcray.allocation.sums import Evaluation, Sums, Tap, evaluation_of
from lcray.errors import TaskError, brief
from lcray.tasks.data.pytree import map_tensors
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.batch_norm import Normalization, depends_on_batches, may_normalize
from lcray.tasks.model.convolution import PaddedConvolutions
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.model.vectors import zeros
from lcray.tasks.task import Task

_FROM_EDGES = torch.__version__ >= "2.7"
_NOBODY: Mapping[int, Sequence[Tap]] = {}


class GradientEngine:
    """Evaluates loss and gradient of any split at the model's current point.

    Attributes:
        partial_sums: number of parts in which the batches of a split are summed.
        colleagues: workers that compute some of the parts; None if there are none.
        on_items: called with the number of each batch of a split that is evaluated here, the losses
            [n] of its items and their weights; None for nobody.
        fixed_batches: whether batches are part of the loss, so that the plan fixes them.

    Args:
        flat: the model.
        task: its loss.
        batch_norm: ``running`` or ``batch``.
    """

    def __init__(self, flat: FlatModel, task: Task, batch_norm: str) -> None:
        self.flat = flat
        self._loss = task.loss
        self.fixed_batches = task.batch_loss or depends_on_batches(flat.model, batch_norm)
        self._normalizes = self.fixed_batches or may_normalize(flat.model)
        self._normalization = Normalization(
            batch_norm, fixed_batches=self.fixed_batches, formula=self._normalizes
        )
        self.partial_sums = 1
        self.colleagues: Colleagues | None = None
        self.on_items: Callable[[int, Tensor, Tensor | None], None] | None = None
        self._part: Tensor | None = None

    def new_vector(self) -> Tensor:
        """A float64 vector [P] of zeros on the device, for gradients and their sums."""
        return zeros(len(self.flat.theta), torch.float64, self.flat.theta.device)

    def evaluate(
        self,
        split: SplitData,
        out: Tensor | None,
        directions: Sequence[Segment] = (),
        *,
        share: float | None = None,
        site: Site | None = None,
        taps: Mapping[int, Sequence[Tap]] = _NOBODY,
    ) -> Evaluation:
        """Loss of `split` at the current point, and its gradient if asked for.

        Args:
            split: the batches.
            out: where the gradient goes, [P] float64; None evaluates the loss alone.
            directions: paths along which the directional derivatives of groups and replicates are
                taken.
            share: add this times Σ w ∂ℓ/∂θ to `out`, instead of writing the gradient of the mean.
            site: where the model is, so that colleagues can go there as well; None computes all
                parts here.
            taps: what takes in the gradients of some batches, by batch; only without colleagues.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
            ClusterError: if a colleague is lost.
        """
        replaces, share = share is None, 1.0 if share is None else share
        divided = split.labels or split.replicates
        directions = directions if divided and out is not None else ()
        if replaces and out is not None:
            out.zero_()
        parts = cut_parts(len(split.batches), self.partial_sums)
        own = range(len(parts))
        answers: Iterator[Answer] = iter(())
        if self.colleagues is not None and site is not None:
            request = Request(split.name, site, share, out is not None)
            own, answers = self.colleagues.share_out(request, len(parts))
        whole = len(parts) <= 1
        sums = [
            self._add_part(split, parts[number], whole, out, directions, share, taps)
            for number in own
        ]
        for answer in answers:
            sums.append(answer.sums)
            if out is not None and answer.gradient is not None:
                for where in self.flat.blocks():
                    out[where] += answer.gradient(where)
        found = evaluation_of(split, sums, len(directions))
        if replaces and out is not None:
            out.div_(found.total_weight)
        return found

    def _add_part(
        self,
        split: SplitData,
        batches: range,
        whole: bool,
        out: Tensor | None,
        directions: Sequence[Segment],
        share: float,
        taps: Mapping[int, Sequence[Tap]],
    ) -> PartSums:
        """Add the sum over a part to `out`; a part of several is first summed by itself."""
        if whole or out is None:
            return self.sum_part(split, batches, out, directions, share, taps)
        self._part = self.new_vector() if self._part is None else self._part.zero_()
        sums = self.sum_part(split, batches, self._part, directions, share, taps)
        out.add_(self._part)
        return sums

    def sum_part(
        self,
        split: SplitData,
        batches: Sequence[int],
        out: Tensor | None,
        directions: Sequence[Segment],
        share: float,
        taps: Mapping[int, Sequence[Tap]] = _NOBODY,
    ) -> PartSums:
        """Sums over some batches of `split` at the current point.

        Args:
            split: the batches.
            batches: the numbers of the batches to sum over, in order.
            out: `share` times Σ w ∂ℓ/∂θ is added to it, [P] float64; None for the loss alone.
            directions: paths along which the directional derivatives of groups and replicates are
                taken.
            share: the factor.
            taps: what takes in the gradients of some batches, by batch.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        divided = split.labels or split.replicates
        sums = Sums(self.flat, split, directions if divided else (), out, share)
        if out is not None or taps:
            self.flat.forget_gradients()
        with self._functions(), torch.enable_grad():
            for index, batch in zip(batches, split.batches.only(batches), strict=True):
                losses, weights = self.item_losses(split, index, batch)
                sums.add_losses(index, losses, weights)
                if self.on_items is not None:
                    self.on_items(index, losses.detach(), weights)
                if out is not None or index in taps:
                    self._add_gradients(split, index, losses, weights, sums, taps.get(index, ()))
        self.flat.check_tied()
        return sums.result()

    @contextmanager
    def _functions(self) -> Iterator[None]:
        """Use lcray's versions of some functions, by fixed rules: all workers compute alike."""
        with ExitStack() as stack:
            if self._normalizes:
                stack.enter_context(self._normalization)
            if self.flat.layout.memory_format == "channels_last":
                stack.enter_context(PaddedConvolutions())
            yield

    def check_statistics(self, split: SplitData) -> None:
        """Check that the loss uses no batch statistics that the model's modules do not show.

        One extra batch is used for this: a watched model may leave out fast paths, and its bits may
        differ.

        Raises:
            TaskError: if it does, e.g. by ``F.batch_norm(training=True)``.
        """
        if self._normalizes:
            return
        batch = next(split.batches.only(range(1)))
        try:
            with self._normalization, torch.no_grad():
                self._loss(self.flat.model, map_tensors(Tensor.clone, batch))
        except TaskError:
            raise
        except Exception:  # the loss may need gradients; real faults show in the evaluation
            return

    def _add_gradients(
        self,
        split: SplitData,
        index: int,
        losses: Tensor,
        weights: Tensor | None,
        sums: Sums,
        taps: Sequence[Tap],
    ) -> None:
        weighted = losses if weights is None else torch.where(weights > 0, losses, 0) * weights
        parts = sums.parts(index, weighted, tapped=bool(taps))
        for number, (rows, part) in enumerate(parts):
            self.flat.receiver = partial(sums.add_gradient, rows, taps)
            try:
                _backward(part.sum(), keep=number + 1 < len(parts))
            except Exception as error:
                raise _failed(_where(split, index), "its backward pass failed", error) from error
            finally:
                self.flat.receiver = None

    def evaluate_sample(self, split: SplitData, out: Tensor) -> float:
        """The mean loss of some samples; its gradient goes into `out`, [P] float64.

        NaN if the samples have no weight: the split as a whole may still have some.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        sums = self.sum_part(split, range(len(split.batches)), out.zero_(), (), 1.0)
        weight = math.fsum(sums.weights)
        if not weight > 0:
            return math.nan
        out.div_(weight)
        return sum(sums.losses) / weight

    def items(self, split: SplitData) -> list[tuple[Tensor, Tensor | None]]:
        """The losses [n] and weights of every batch of `split` at the current point.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        found = []
        with self._functions(), torch.enable_grad():
            for index, batch in enumerate(split.batches):
                losses, weights = self.item_losses(split, index, batch)
                found.append((losses.detach(), weights))
        self.flat.check_tied()
        return found

    def _result(self, batch: Any) -> Any:
        """The result of the task's loss."""
        self.flat.restore_constants()
        try:
            return self._loss(self.flat.model, batch)
        except RuntimeError as error:
            if self._normalizes or "running_" not in str(error):
                raise
        # E.g. statistics that are parameters: torch computes no gradient for them.
        with self._normalization:
            return self._loss(self.flat.model, batch)

    def item_losses(self, split: SplitData, index: int, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The losses [n] of a batch and their weights, checked.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        where = _where(split, index)
        try:
            result = self._result(batch)
        except TaskError:
            raise
        except Exception as error:
            raise _failed(where, "failed", error) from error
        if isinstance(result, tuple) and len(result) != 2:
            raise TaskError(
                f"{where}: gave {len(result)} values, not losses, or losses and weights"
            )
        losses, weights = result if isinstance(result, tuple) else (result, None)
        _check_losses(where, losses, split.batch_sizes[index])
        if weights is not None:
            _check_weights(where, losses, weights)
            # At least float32: 16 bits would round the weights.
            weights = weights.detach().to(torch.promote_types(losses.dtype, torch.float32))
        if split.labels and len(split.labels[index]) != len(losses):
            raise TaskError(
                f"{where}: {len(losses)} losses but {len(split.labels[index])} group labels; "
                "groups must give one label per item"
            )
        return losses, weights


def _backward(total: Tensor, *, keep: bool) -> None:
    """Run the backward pass of `total`, [], with lcray's versions of functions active.

    It recomputes layers under `torch.utils.checkpoint`, which must give the same values. Called on
    a tensor, torch would run the pass without these versions.
    """
    root: Any = torch.autograd.graph.get_gradient_edge(total) if _FROM_EDGES else total
    torch.autograd.backward((root,), (torch.ones_like(total),), retain_graph=keep)


def layer_dots(flat: FlatModel, gradient: Tensor, segment: Segment) -> Tensor:
    """Σ g·Δ over each layer, [L] float64, one block at a time; `gradient` is [P]."""
    # Into one tensor: small tensors that stay would keep the heap from reusing the blocks' memory.
    sums = torch.zeros(len(flat.layers), dtype=torch.float64, device=gradient.device)
    size = next(flat.blocks()).stop
    for block, pieces in flat.layout.pieces(size):
        # Converted first: products of two dtypes take four times as long.
        product = segment.difference(block) * gradient[block].double()
        for number, where in pieces:
            sums[number].add_(product[where].sum())
    return sums


def _where(split: SplitData, index: int) -> str:
    return f"task loss on split {split.name!r}, batch {index}"


def _failed(where: str, what: str, error: Exception) -> TaskError:
    return TaskError(f"{where}: {what}: {brief(error)}")


def _check_losses(where: str, losses: Any, batch_size: int) -> None:
    if not isinstance(losses, Tensor):
        gave = "nothing (no return?)" if losses is None else f"a {type(losses).__name__}"
        raise TaskError(f"{where}: must give a tensor [n], gave {gave}")
    reduced = losses.dim() == 0 or (losses.shape == (1,) and batch_size > 1)
    if reduced:
        raise TaskError(
            f"{where}: gave a single number for {batch_size} samples; give one loss per item "
            "(reduction='none'; weight 0 for items that do not count)"
        )
    if losses.dim() != 1:
        raise TaskError(f"{where}: gave shape {list(losses.shape)}, must be [n]; flatten it")
    if not losses.is_floating_point():
        raise TaskError(f"{where}: gave {losses.dtype}, must be a float tensor")
    if not losses.requires_grad:
        raise TaskError(
            f"{where}: has no gradient; remove no_grad, detach or inference_mode from the loss"
        )


def _check_weights(where: str, losses: Tensor, weights: Any) -> None:
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise TaskError(f"{where}: weights {shape} do not match the losses {list(losses.shape)}")
    if weights.requires_grad:
        raise TaskError(
            f"{where}: weights have a gradient, so they depend on the model; weights must come "
            "from the data alone; multiply the losses by factors that depend on the model"
        )
