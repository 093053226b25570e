"""FLOPs of training: by a formula, or by counting one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradient_blueprints.run_models import Instrument


@dataclass(frozen=True)
class FlopRate:
    """FLOPs that training spends on each position of a batch, padding too, and how that is known."""

    per_token: float
    instrument: Instrument


def flops_by_formula(model: nn.Module) -> FlopRate:
    """6·N a token (Kaplan et al. 2020), and 6·N·(2/3 + k/3) when only a share k of the N parameters gets a gradient.

    The forward pass takes 2·N, the gradients of the activations 2·N and those of the weights 2·k·N. A parameter of
    which some coordinates are selected counts whole: its gradient is computed whole. N leaves out embeddings, which
    are looked up, unless they are the output head too. Attention scores are left out (of the order of
    length/(6·width) of the rest), as is the recomputation of checkpointed activations.
    """
    counted = multiplied_parameters(model)
    total = sum(parameter.numel() for parameter in counted)
    trained = sum(parameter.numel() for parameter in counted if parameter.requires_grad)
    return FlopRate(4 * total + 2 * trained, Instrument.FLOP_FORMULA)


def multiplied_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but embeddings that are looked up only."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    used_otherwise = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return [
        parameter
        for parameter in model.parameters()
        if id(parameter) not in looked_up or id(parameter) in used_otherwise
    ]


def flops_by_counting(step: Callable[[], object], tokens: int) -> FlopRate:
    """Run one step, forward and backward, under torch.utils.flop_counter and divide by its `tokens`.

    It counts matrix products, convolutions and attention as they are run, recomputation too, and nothing else;
    operators from other packages only if they registered a formula.

    >>> # meter.flop_rate = flops_by_counting(lambda: model(**batch).loss.backward(), batch["input_ids"].numel())
    """
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        step()
    return FlopRate(counter.get_total_flops() / tokens, Instrument.FLOP_COUNTER)
