"""Per-example losses: the mean over each example's own target tokens, and what a batch holds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradient_blueprints.errors import ConfigurationError

IGNORED = -100
Batch = Mapping[str, Any]
LossFunction = Callable[[Any, Batch], Tensor]
"""Per-example losses (examples,) from the model's output and the batch."""

_GIVE_TENSORS = 'of a data set of `datasets` take .with_format("torch")'
_GIVE_LOSS = (
    "pass loss=function(outputs, batch) that returns one loss per example to GradientProfiler, exact_influences, "
    "GradientNorm or GradientSimilarity; nothing else reads another loss."
)


@dataclass(slots=True)
class Losses:
    """Each example's mean loss, differentiable, and its number of target tokens; both (examples,)."""

    values: Tensor
    tokens: Tensor


def examples_in(batch: Batch) -> int:
    """Length of the leading dimension that counts examples."""
    for name in ("input_ids", "inputs_embeds", "pixel_values", "labels"):
        if isinstance(batch.get(name), Tensor):
            return int(batch[name].shape[0])
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    raise ConfigurationError(
        f"The batch holds no tensor; give a dict with input_ids, and attention_mask and labels if any; {_GIVE_TENSORS}."
    )


_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features")


def slice_examples(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Some of the examples; values without the examples' dimension are kept whole.

    Raises ConfigurationError for images or sounds whose rows are not one an example.
    """
    examples = examples_in(batch)
    if stop - start >= examples:
        return dict(batch)
    for name, value in batch.items():
        if name.startswith(_MEDIA) and isinstance(value, Tensor) and value.dim() and value.shape[0] != examples:
            raise ConfigurationError(
                f"{name} has {value.shape[0]} rows for {examples} examples, and which of them belong to which cannot "
                "be told: give batches of one example."
            )
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.dim() and value.shape[0] == examples else value
        for name, value in batch.items()
    }


def first_labelled(batch: Batch) -> int:
    """Position of the first example with a target; 0 in a batch without any.

    A label at the first position is a target only where labels are not shifted, so later ones are looked for first.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim():
        counted = labels.ne(IGNORED).flatten(1) if labels.dim() > 1 else labels.ne(IGNORED).unsqueeze(1)
        for found in (counted[:, 1:].any(1), counted.any(1)):
            if bool(found.any()):
                return int(found.nonzero()[0])
    return 0


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch on the model's device; as it is where weights are offloaded by accelerate, which moves it itself."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return dict(batch)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module is in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _labels(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ConfigurationError(
            f"The batch has no tensor of labels, nor of input_ids to take their place; {_GIVE_TENSORS}."
        )
    return labels


def _padding(batch: Batch, pad_token_id: int | None) -> Tensor:
    """Which of the input ids are padding, as the attention mask says, or without one the token."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask == 0
    return torch.zeros_like(ids, dtype=torch.bool) if pad_token_id is None else torch.eq(ids, pad_token_id)


class LossReader:
    """Runs the model on a batch and reads each example's loss off its logits.

    Whether labels are shifted by one (causal models) is not guessed: the first run with a label compares
    both with the loss that the model itself reports. A model with another loss needs a `LossFunction`.
    """

    def __init__(self, model: nn.Module, loss: LossFunction | None = None) -> None:
        self.model = model
        self._loss = loss
        self._accepted = inspect.signature(model.forward).parameters
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        """Whether the model makes its decoder's inputs out of the labels, and so has to be given them."""
        self.shift: bool | None = False if loss is not None else None
        self._made_labels = False

    def with_labels(self, batch: Batch, pad_token_id: int | None = None, *, run: bool = True) -> dict[str, Any]:
        """The batch with labels: those given, else the input ids with padding ignored.

        Ignored too, where labels are shifted, is a token after padding, as at the start of a row padded on the left: it
        would be predicted from padding. `run`: find out by running the model, if need be, whether labels are shifted.
        """
        batch = dict(batch)
        if batch.get("labels") is None and isinstance(batch.get("input_ids"), Tensor):
            hidden = _padding(batch, pad_token_id)
            labels = batch["labels"] = batch["input_ids"].masked_fill(hidden, IGNORED)
            self._made_labels = True
            groundless = hidden[..., :-1] & ~hidden[..., 1:]
            if bool(groundless.any()) and (self.shifts(batch) if run else self.shift_of(labels)):
                labels[..., 1:][groundless] = IGNORED
        return batch

    def output_of(self, inputs: Batch) -> Any:
        """What the model gives; ConfigurationError where its loss is of other labels than the input ids instead."""
        try:
            return self.model(**inputs)
        except ValueError as error:
            if not self._made_labels:
                raise
            raise ConfigurationError(
                f"the batch has no labels, and {type(self.model).__name__} does not take the input ids in their place "
                f"({error}): give them under the name labels, to a classifier one class for each example"
            ) from error

    def run(self, batch: Batch) -> Losses:
        """Forward pass of a batch that has labels."""
        inputs = {name: value for name, value in batch.items() if name != "labels" or self._loss is not None}
        if "use_cache" in self._accepted:
            inputs.setdefault("use_cache", False)  # a cache of keys and values would only cost memory
        if self._loss is not None:
            outputs = self.output_of(inputs)
            values = self._loss(outputs, batch)
            labels = batch.get("labels")
            if isinstance(labels, Tensor) and labels.dim() > 1:
                return Losses(values, labels.ne(IGNORED).flatten(1).sum(1).clamp_min(1))
            return Losses(values, torch.ones_like(values, dtype=torch.long))
        labels = _labels(batch)
        if self.shift is None or self.seq2seq:
            inputs["labels"] = labels
        outputs = self.output_of(inputs)
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
            raise ConfigurationError(f"The model's labels are not one class for each row of its logits; {_GIVE_LOSS}")
        self._refuse_auxiliary(outputs)
        if self.shift is None and bool((labels != IGNORED).any()):
            self.shift = self._find_shift(logits, labels, getattr(outputs, "loss", None))
        return token_losses(logits, labels, shift=self.shift_of(labels))

    def shifts(self, batch: Batch) -> bool:
        """Whether labels are shifted: while no run has told, the first example with a label is run."""
        labels = _labels(batch)
        if self.shift is None and bool(labels.ne(IGNORED).any()):
            first = first_labelled(batch)
            with evaluating(self.model), torch.no_grad():
                self.run(on_device_of(self.model, slice_examples(batch, first, first + 1)))
        return self.shift_of(labels)

    def shift_of(self, labels: Tensor) -> bool:
        """Whether these labels are shifted; while no run has told, as the commonest model of their kind does."""
        if self.shift is None:
            return not self.seq2seq and labels.dim() > 1
        return self.shift

    def tokens_of(self, batch: Batch) -> Tensor | None:
        """Target tokens of every example; None when the loss is the caller's and weighs examples itself."""
        if self._loss is not None:
            return None
        return target_tokens(batch["labels"], shift=self.shift_of(batch["labels"]))

    def _refuse_auxiliary(self, outputs: Any) -> None:
        """ConfigurationError for a mixture whose loss has a term of its routers, often too small to be told by size."""
        weight = getattr(self.model, "router_aux_loss_coef", 0)
        if isinstance(getattr(outputs, "aux_loss", None), Tensor) and weight:
            raise ConfigurationError(
                "The model's loss is not the mean cross-entropy of its target tokens: it has an auxiliary loss of the "
                f"routers, {weight:g} times; set model.config.output_router_logits = False, or {_GIVE_LOSS}"
            )

    def _find_shift(self, logits: Tensor, labels: Tensor, reported: Tensor | None) -> bool | None:
        """None where the loss is not finite: of a causal model without a target, or of broken values."""
        if reported is None:
            return self.shift_of(labels)
        value = float(reported.detach())
        if not math.isfinite(value):
            return None
        found: dict[bool, float] = {}
        for shift in (True, False) if labels.dim() > 1 else (False,):
            with torch.no_grad():
                losses = token_losses(logits.detach(), labels, shift=shift)
            mean = float((losses.values * losses.tokens).sum() / losses.tokens.sum().clamp_min(1))
            found[shift] = mean
        shift = min(found, key=lambda key: abs(found[key] - value))
        if not is_mean(found[shift], reported, logits):
            raise ConfigurationError(
                f"The model's loss ({value:.6g}) is not the mean cross-entropy of its target tokens; {_GIVE_LOSS}"
            )
        return shift


def is_mean(mean: float, reported: Tensor, logits: Tensor) -> bool:
    """Whether the loss that a model reports is the mean cross-entropy of these logits, to the rounding of the two."""
    half = min(reported.element_size(), logits.element_size()) < 4
    return abs(mean - float(reported.detach())) <= (1e-2 if half else 1e-3) * (1 + abs(mean))


def target_tokens(labels: Tensor, *, shift: bool) -> Tensor:
    """Number of targets of every example, (examples,)."""
    if labels.dim() == 1:
        return (labels != IGNORED).long()
    return (labels[:, 1:] if shift else labels).ne(IGNORED).flatten(1).sum(1)


def token_losses(logits: Tensor, labels: Tensor, *, shift: bool) -> Losses:
    """Mean cross-entropy of each example's targets, logits (n, t, vocabulary) or (n, classes)."""
    labels = labels.to(logits.device)
    tokens = target_tokens(labels, shift=shift)
    if labels.dim() == 1:
        return Losses(functional.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="none"), tokens)
    if shift:  # shift the labels, not the logits: a slice of the logits would be copied
        labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    weights = (labels != IGNORED) / tokens.clamp_min(1).unsqueeze(1)  # (n, t)
    values = [
        _CrossEntropy.apply(*example)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for example in zip(logits, labels, weights, strict=True)
    ]
    return Losses(torch.stack(values), tokens)


class _CrossEntropy(torch.autograd.Function):
    """sum_t w_t * cross-entropy_t of one example, its gradient computed with the loss.

    softmax - onehot takes the place of the saved log-probabilities, so the vocabulary-sized
    temporaries of an example live once, in float32, and the backward pass is one multiplication.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        wide = _wide(logits)
        counted = labels != IGNORED
        targets = labels.clamp_min(0).unsqueeze(1)
        norm = torch.logsumexp(wide, 1)
        losses = norm - wide.gather(1, targets).squeeze(1)
        value = (losses * weights.to(losses.dtype))[counted].sum()
        if ctx.needs_input_grad[0]:
            gradient = torch.exp(wide - norm.unsqueeze(1))
            gradient.scatter_add_(1, targets, -torch.ones_like(norm).unsqueeze(1))
            gradient *= weights.to(losses.dtype).unsqueeze(1)
            ctx.save_for_backward(gradient.to(logits.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
