"""Examples whose gradient points where the target's does: random projections of whole-model gradients (LESS-like).

After LESS (Xia et al. 2024), without its Adam preconditioning, its LoRA warm-up and its several checkpoints: plain
gradients of the whole model as it is. Example by example, one backward pass each: about three forward passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.data_selection import Scores
from gradient_blueprints.training.gradient_hooks import unread
from gradient_blueprints.training.profiling.losses import (
    Batch,
    LossFunction,
    LossReader,
    evaluating,
    examples_in,
    on_device_of,
    slice_examples,
)


@dataclass(frozen=True)
class GradientSimilarity:
    """Strategy: the cosine of an example's projected gradient with the mean of the target's unit gradients.

    The gradient is of every tensor that requires one: of the whole model, so choose data before `apply_selection`.

    `target`: batches of the domain to get better at, a few dozen examples. Unit gradients, since otherwise a few loud
    target examples decide, and the cosine, since otherwise short loud examples win.
    `loss(outputs, batch)`: per-example losses of a model whose loss is not a mean cross-entropy.
    """

    target: tuple[Batch, ...]
    dimension: int = 4096
    seed: int = 0
    loss: LossFunction | None = None

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        wanted = projected_gradients(model, self.target, self.dimension, self.seed, self.loss)
        wanted = wanted[wanted.isfinite().all(1)]
        direction = torch.nn.functional.normalize(wanted).mean(0)
        if not bool(direction.norm() > 0):
            raise ConfigurationError("The target has no example with a gradient.")
        found = [
            float(torch.cosine_similarity(gradient, direction, dim=0)) if bool(gradient.norm() > 0) else np.nan
            for gradient in _projections(model, batches, self.dimension, self.seed, self.loss)
        ]
        if not found:
            raise ConfigurationError("there is no batch to score: was the iterator used up before?")
        return np.array(found, np.float64)


def projected_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    dimension: int = 4096,
    seed: int = 0,
    loss: LossFunction | None = None,
) -> Tensor:
    """Every example's whole-model gradient, folded to `dimension` numbers, float32 (examples, dimension).

    Coordinate i goes with a random sign to a random bucket (count sketch, Charikar et al. 2002). Inner products are
    kept in expectation: E⟨Pg, Ph⟩ = ⟨g, h⟩, with variance at most (‖g‖²‖h‖² + ⟨g, h⟩²)/dimension, as good as a dense
    projection at one addition a coordinate. The same model, dimension and seed give the same projection; 5 bytes a
    parameter are held for it. NaN for an example without a target.
    """
    rows = list(_projections(model, batches, dimension, seed, loss))
    return torch.stack(rows) if rows else torch.empty(0, dimension)


def _projections(
    model: nn.Module, batches: Iterable[Batch], dimension: int, seed: int, loss: LossFunction | None
) -> Iterator[Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(parameter.grad is not None for parameter in parameters.values()):
        raise ConfigurationError("The model holds gradients: call model.zero_grad() first.")
    folds = {name: _fold(name, parameter.numel(), dimension, seed) for name, parameter in parameters.items()}
    projected = torch.zeros(dimension)

    def take(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        buckets, signs = folds[name]
        projected.index_add_(0, buckets, parameter.grad.flatten().float().cpu() * signs)
        parameter.grad = None  # one tensor's gradient exists at a time

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda tensor, name=name: take(name, tensor))  # type: ignore[no-untyped-call]  # torch has no types
        for name, parameter in parameters.items()
    ]
    reader = LossReader(model, loss)
    try:
        for given in batches:
            batch = on_device_of(model, reader.with_labels(given))
            for position in range(examples_in(batch)):
                projected.zero_()
                with unread(parameters.values()), evaluating(model), torch.enable_grad():
                    losses = reader.run(slice_examples(batch, position, position + 1))
                    if int(losses.tokens[0]):
                        losses.values.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types
                    else:
                        projected.fill_(torch.nan)
                yield projected.clone()
    finally:
        for hook in hooks:
            hook.remove()


def _fold(name: str, entries: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of every coordinate, int32 and int8, drawn for this tensor alone: order does not matter."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    buckets = torch.randint(dimension, (entries,), generator=generator, dtype=torch.int32)
    signs = torch.randint(2, (entries,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return buckets, signs
