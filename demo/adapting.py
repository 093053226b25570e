"""Fine-tuning for the comparison: the same steps on the same data, all of the model or a selection of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from demo.models import Batch, mean_loss
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection, optimizer_bytes
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.selection import Selection

Report = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """What one way of fine-tuning came to."""

    name: str
    trained: int
    """Parameters that were trained."""
    learning_rate: float
    loss: float
    """Held-out, nats per token."""
    optimizer_bytes: int
    """Measured: the moments, and for a selection its indices."""
    gradient_bytes: int
    """Measured: gradients held when the optimizer steps."""
    largest_gradient_bytes: int
    """Beyond those: the one whole gradient that exists for a moment, of the largest trained tensor."""
    seconds: float

    @property
    def training_bytes(self) -> int:
        return self.optimizer_bytes + self.gradient_bytes


def fine_tune(
    name: str,
    model: PreTrainedModel,
    selection: Selection | None,
    batches: Sequence[Batch],
    heldout: Sequence[Batch],
    learning_rate: float,
    report: Report = lambda step: None,
) -> Outcome:
    """Train a copy of `model`, all of it or a selection, with AdamW: warmup of a tenth, then constant, no decay."""
    model = copy.deepcopy(model).train()
    optimizer: torch.optim.Optimizer
    if selection is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        trained = sum(parameter.numel() for parameter in model.parameters())
    else:
        selected = apply_selection(model, selection)
        optimizer = SelectedAdamW(selected, lr=learning_rate, weight_decay=0.0)
        trained = sum(entry.selected for entry in selected)
    warmup = max(1, len(batches) // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    gradient_bytes = largest = 0
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        if isinstance(optimizer, SelectedAdamW):
            largest = optimizer.largest_gradient_bytes
        else:
            gradient_bytes = sum(
                parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
            )
        optimizer.step()
        if isinstance(optimizer, SelectedAdamW):
            gradient_bytes = optimizer.gradient_bytes
        optimizer.zero_grad()
        scheduler.step()
        report(step)
    seconds = time.monotonic() - started
    held = optimizer.optimizer_bytes() if isinstance(optimizer, SelectedAdamW) else optimizer_bytes(optimizer)
    loss = mean_loss(model, heldout)
    return Outcome(name, trained, learning_rate, loss, held, gradient_bytes, largest, seconds)


def norms_by_batch(profiler: GradientProfiler, domain: str) -> dict[str, list[float]]:
    """Of every layer the norm of each batch's gradient, as a staleness check takes them."""
    batches = [record.norms for record in profiler.domain(domain).records.values() if record.norms is not None]
    return {group.id: [float(batch[index]) for batch in batches] for index, group in enumerate(profiler.layers)}
