"""What a local sample says of every coordinate: its mean gradient, and how noisy that is, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.blocks import blocks, square_sums
from gradient_blueprints.training.gradient_hooks import unread
from gradient_blueprints.training.profiling.layers import check_names
from gradient_blueprints.training.profiling.losses import LossReader, evaluating, examples_in, on_device_of
from gradient_blueprints.training.selection.listed_tensors import kept_fixed

Kept = Literal["mean", "square", "factors"]
_Generators = dict[torch.device, torch.Generator]
"""Of random numbers, one on each device."""


@dataclass
class LocalStatistics:
    """Statistics of the gradients of a local sample's batches, by tensor name.

    One number a coordinate is kept at most, and never a second: the mean gradient, or the mean square, or nothing but
    the row and column means of the squares.
    """

    mean: dict[str, Tensor] = field(default_factory=dict)
    square: dict[str, Tensor] = field(default_factory=dict)
    row: dict[str, Tensor] = field(default_factory=dict)
    """Row means of the squared batch gradients, summed over the batches, float32; of a vector its squares."""
    column: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    sequences: int | None = 0
    """Examples seen; None where it is not known."""

    @classmethod
    def gather(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        keep: Kept = "mean",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LocalStatistics:
        """Measure the batches; a gradient is read as soon as it is there, tensor by tensor, and freed.

        The batches are held in a list meanwhile: a mean needs their number.
        `dtype=torch.bfloat16` halves what is kept; it is rounded stochastically, so that small batches do not vanish
        in the sum. `device="cpu"` keeps it beside the model's device. At least two batches tell how noisy the mean is.
        Labels default to the input ids with padding masked, and with it, but for an encoder-decoder model, the
        token after padding. Dropout is off; modes and random state stay as they are.
        Layers that gradient checkpointing is enabled for are checkpointed here too.
        What an earlier selection froze is measured too, since the next may choose it; what you froze is not.

        Raises ConfigurationError when there is no batch, the model gives no loss, no tensor gets a gradient, or the
        model has adapters of peft.
        """
        if keep not in get_args(Kept):
            raise ConfigurationError(f"keep is one of {', '.join(get_args(Kept))}, not {keep!r}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigurationError(f"the mean gradient is kept in float32 or bfloat16, not in {dtype}")
        batches = list(batches)
        if not batches:
            raise ConfigurationError("there is no batch to measure: was the iterator used up before?")
        found = cls()
        lots: _Generators = {}

        def take(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.detach().to(device or parameter.device, torch.float32)
            parameter.grad = None
            if gradient.numel() > 0:
                found._add(name, gradient, keep, dtype, len(batches), lots)

        reader = LossReader(model)
        with gradients_taken(model, take):
            for batch in batches:
                _loss(reader, reader.with_labels(on_device_of(model, batch), run=False)).backward()
                found.batches += 1
                found.sequences = (found.sequences or 0) + examples_in(batch)
        if not found.row:
            raise ConfigurationError(
                "no tensor of the model got a gradient: all of it is frozen, or its weights are offloaded "
                "(device_map, cpu_offload), of which GradientProfiler measures a blueprint and factors"
            )
        return found

    def _add(
        self, name: str, gradient: Tensor, keep: Kept, dtype: torch.dtype, batches: int, lots: _Generators
    ) -> None:
        for sums, means in zip((self.row, self.column), squared_means(gradient), strict=True):
            if means is not None:
                sums[name] = sums[name] + means if name in sums else means
        if keep == "factors":
            return
        held = self.mean if keep == "mean" else self.square
        if name not in held:
            held[name] = torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)
        step = block_of(gradient.device)
        for part, of_batch in zip(blocks(held[name], step), blocks(gradient.contiguous(), step), strict=True):
            value = (of_batch if keep == "mean" else of_batch.square()) / batches
            if dtype == torch.float32:
                part += value
            else:
                part.copy_(_rounded(value.add_(part), lots))

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """{tensor: {"row": ..., "column": ...}} of the mean squared batch gradient, as a blueprint's attachment."""
        return {name: self.factors_of(name) for name in self.row}

    def factors_of(self, name: str) -> dict[str, Tensor]:
        """{"row": ..., "column": ...} of one tensor, a vector without a column."""
        sums = {"row": self.row, "column": self.column}
        return {side: held[name] / self.batches for side, held in sums.items() if name in held}

    def noise(self, name: str) -> dict[str, Tensor] | None:
        """Factors of the variance of the mean gradient s²/n, or None where fewer than two batches tell.

        Over b batches, by row and by column: (mean of the squares − square of the mean) / (b − 1), at least 0.
        """
        if self.batches < 2 or name not in self.row or name not in self.mean:
            return None
        of_mean = zip(("row", "column"), squared_means(self.mean[name]), strict=True)
        of_batches = self.factors_of(name)
        return {
            side: ((of_batches[side] - squared) / (self.batches - 1)).clamp_min(0.0)
            for side, squared in of_mean
            if squared is not None
        }


def mean_gradients(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mean gradient of the local batches' losses, by tensor name, in float32; see `LocalStatistics.gather`."""
    return LocalStatistics.gather(model, batches).mean


def _loss(reader: LossReader, batch: Mapping[str, Any]) -> Any:
    loss = getattr(reader.output_of(batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"{type(reader.model).__name__} gives no loss for a batch of {', '.join(batch)}: take the model with the "
            "head that is to be trained, and give what its loss needs, such as labels"
        )
    return loss


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as its factors see it: the places of a filter are columns."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def squared_means(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Row and column means of a tensor's squares, float32; of a vector its squares, and None."""
    matrix = as_matrix(tensor)
    if matrix.dim() < 2:
        return matrix.float().square(), None
    row, column = square_sums(matrix, block_of(tensor.device))
    return row / matrix.shape[-1], (column / matrix.shape[-2]).float()


def block_of(device: torch.device) -> int:
    """Entries of a tensor to work on at a time, a multiple of 4 (`_rounded`).

    On a CPU what stays in its cache; elsewhere a call costs more than the work on so few.
    """
    return 1 << (15 if device.type == "cpu" else 22)


def _rounded(value: Tensor, lots: _Generators) -> Tensor:
    """In bfloat16 up or down at random, in proportion to the nearness: right on average."""
    device = value.device
    if device not in lots:
        lots[device] = torch.Generator(device).manual_seed(0)
    # Four lots of 16 bits from each draw: drawing is what takes the time.
    drawn = torch.empty((value.numel() + 3) // 4, dtype=torch.int64, device=device)
    drawn.random_(-(1 << 63), None, generator=lots[device])
    noise = drawn.view(torch.uint16)[: value.numel()].view(value.shape).to(torch.int32)
    bits = noise.add_(value.contiguous().view(torch.int32))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


@contextmanager
def gradients_taken(model: nn.Module, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `take(name, parameter)` is called as soon as a gradient is there; in evaluation mode.

    Of every tensor that `select` may choose from: those that an earlier selection froze require gradients meanwhile.
    """
    fixed = kept_fixed(model)
    free = {name: parameter for name, parameter in model.named_parameters() if name not in fixed}
    check_names(free)
    if any(parameter.grad is not None for parameter in free.values()):
        raise ConfigurationError("the model holds gradients: call model.zero_grad() before local statistics are taken")
    frozen = [parameter for parameter in free.values() if not parameter.requires_grad]

    def hook(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: take(name, parameter)

    with ExitStack() as stack:
        for parameter in frozen:
            stack.callback(parameter.requires_grad_, False)
            parameter.requires_grad_(True)
        for name, parameter in free.items():
            registered = parameter.register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]  # torch has no types
            stack.callback(registered.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(without_caches(model))
        stack.enter_context(checkpointing(model))
        stack.enter_context(unread(free.values()))
        yield


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """While open, Hugging Face's models keep no keys, values or states for a next token, as they do not in training.

    They would be held, a layer that is computed anew from its checkpoint would add its keys a second time, and some
    models write into them what the backward pass still needs.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    with ExitStack() as stack:
        for config in configs:
            if getattr(config, "use_cache", False):
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        yield


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """While open, Hugging Face's layers that checkpoint in training mode do so in evaluation mode too.

    What trains in memory with checkpointing might not be measured in it without. A layer is in training mode up to its
    checkpoint alone: inside it, dropout of its own is off as well.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and any(each.__name__ == "GradientCheckpointingLayer" for each in type(module).__mro__)
    ]
    with ExitStack() as stack:
        for layer in layers:
            checkpoint = layer._gradient_checkpointing_func
            stack.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
            stack.callback(setattr, layer, "training", layer.training)
            layer._gradient_checkpointing_func = _evaluated(layer, checkpoint)
            layer.training = True
        yield


def _evaluated(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The checkpoint of a layer that is in evaluation mode within."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*inputs: Any) -> Any:
            layer.training = False
            try:
                return function(*inputs)
            finally:
                layer.training = True

        return checkpoint(evaluated, *args)

    return run
