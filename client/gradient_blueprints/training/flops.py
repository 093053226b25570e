"""FLOPs of training: by a formula, or by counting one step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Instrument
from gradient_blueprints.training.profiling.experts import routed_shares

CROSS_ATTENTION = re.compile(r"(EncDecAttention|encoder_attn|cross_?att(n|ention))\..*\b(k|v|key|value)(_proj)?(\.|$)")
"""Keys and values of a decoder's attention to what the encoder read, as transformers names them."""


@dataclass(frozen=True)
class FlopRate:
    """FLOPs that training spends on each position of a batch, padding too, and how that is known."""

    per_token: float
    instrument: Instrument
    per_source_token: float | None = None
    """On each position that an encoder reads, where that is another; `per_token` is then of the decoder's."""

    def flops(self, positions: int, source: int = 0) -> float:
        """Of so many positions, and of those that an encoder reads beside a decoder."""
        per_source = self.per_token if self.per_source_token is None else self.per_source_token
        return self.per_token * positions + per_source * source


def flops_by_formula(model: nn.Module) -> FlopRate:
    """6·N a token (Kaplan et al. 2020), and 6·N·(2/3 + k/3) when only a share k of the N parameters gets a gradient.

    The forward pass takes 2·N, the gradients of the activations 2·N and those of the weights 2·k·N. A parameter of
    which some coordinates are selected counts whole: its gradient is computed whole. N leaves out embeddings, which
    are looked up, unless they are the output head too, and of a mixture's experts those that a token is not routed to.
    Attention scores are left out (of the order of length/(6·width) of the rest), as is the recomputation of
    checkpointed activations. Raises ConfigurationError as `multiplied_parameters` does.

    Of an encoder-decoder model the parameters that multiply what the encoder reads are told apart: the encoder's, and
    those of the keys and values of cross-attention. ConfigurationError where it does not tell which its encoder is.
    """
    counted = multiplied_parameters(model)
    if not encodes_and_decodes(model):
        return FlopRate(_rate(counted), Instrument.FLOP_FORMULA)
    source = _source_parameters(model)
    of_encoder = {parameter: entries for parameter, entries in counted.items() if parameter in source}
    of_decoder = {parameter: entries for parameter, entries in counted.items() if parameter not in source}
    return FlopRate(_rate(of_decoder), Instrument.FLOP_FORMULA, _rate(of_encoder))


def _rate(counted: Mapping[nn.Parameter, float]) -> float:
    trained = sum(entries for parameter, entries in counted.items() if parameter.requires_grad)
    return 4 * sum(counted.values()) + 2 * trained


def encodes_and_decodes(model: nn.Module) -> bool:
    """Whether it reads one text and writes another, so that no parameter multiplies for the tokens of both."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def _source_parameters(model: nn.Module) -> set[nn.Parameter]:
    if not hasattr(model, "get_encoder"):
        raise ConfigurationError(
            f"{type(model).__name__} has an encoder and a decoder, and no get_encoder() that tells them apart: count a "
            "step with flops_by_counting, and give the meter what it answers as flop_rate"
        )
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]  # of transformers
    cross = (module for name, module in model.named_modules() if CROSS_ATTENTION.search(name))
    return {
        parameter
        for module in (*encoder.modules(), *cross)
        if not isinstance(module, nn.Embedding)  # whose weight may be the head's too
        for parameter in module.parameters(recurse=False)
    }


def multiplied_parameters(model: nn.Module) -> dict[nn.Parameter, float]:
    """How many entries of each parameter multiply for a token: of a mixture's experts the share that it is routed to.

    Embeddings that are looked up only are left out. ConfigurationError where no configuration tells how many experts a
    token meets.
    """
    shares = routed_shares(model)
    counted: dict[nn.Parameter, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            share = shares.get(parameter, 1.0)
            if share is None:
                raise ConfigurationError(
                    f"no configuration tells how many experts of {name} a token is routed to: count a step with "
                    "flops_by_counting, and give the meter what it answers as flop_rate"
                )
            counted[parameter] = parameter.numel() * share
    return counted


def flops_by_counting(step: Callable[[], object], tokens: int) -> FlopRate:
    """Run one step, forward and backward, under torch.utils.flop_counter and divide by its `tokens`.

    `tokens` are all positions, padding too, and of an encoder-decoder model those of both. (The rate holds as long as
    the two keep their proportion; the formula tells them apart.)

    It counts matrix products, those of experts as transformers groups them too, convolutions and attention as they are
    run, recomputation too, and nothing else; operators from other packages only if they registered a formula.

    >>> # meter.flop_rate = flops_by_counting(lambda: model(**batch).loss.backward(), batch["input_ids"].numel())
    """
    grouped = {
        getattr(operators, name): formula
        for operators, name, formula in (
            (torch.ops.aten, "_grouped_mm", _grouped_product),  # its backward pass is made of the same
            (torch.ops.transformers, "grouped_mm_fallback", _grouped_product),
            (torch.ops.transformers, "grouped_mm_fallback_backward", _both_gradients),
        )
        if hasattr(operators, name)  # they came with versions of torch and transformers
    }
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, torch.enable_grad():
        step()
    return FlopRate(counter.get_total_flops() / tokens, Instrument.FLOP_COUNTER)


def _grouped_product(one: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    """Each row of a matrix (rows, ·) meets one of the stack (experts, ·, ·), or sums go over each expert's rows."""
    return 2 * (math.prod(one) * other[-1] if len(one) == 2 else math.prod(other) * one[-2])


def _both_gradients(one: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _grouped_product(one, other)
