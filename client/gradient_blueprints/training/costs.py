"""The cost model C(k) = a·N + b·k·N of the paper's section 4.1, fitted from training steps measured on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import CostModel
from gradient_blueprints.theory import BestFraction, Regime, best_fraction, cost
from gradient_blueprints.training.finetuning import SelectedAdamW, optimizer_bytes
from gradient_blueprints.training.memory import peak_bytes
from gradient_blueprints.training.selected_parameters import SelectedParameter

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class StepCost:
    """What one training step cost with a share of the coordinates trained."""

    share: float
    peak_bytes: float
    seconds: float


@dataclass(frozen=True)
class CostFit:
    """`costs` are per parameter, in bytes or seconds; `error` is the largest relative distance of a measurement."""

    costs: CostModel
    error: float
    parameters: int


def measure_costs(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    shares: Sequence[float] = SHARES,
    *,
    repeats: int = 3,
    seed: int = 0,
) -> list[StepCost]:
    """Train a copy of `model` for some steps at each share of random coordinates, and measure the step.

    What is frozen stays so, and a share is one of the rest.
    `peak_bytes` is everything: weights, gradients, state, indices, activations. `seconds` is the fastest of
    `repeats` steps. Share 1 too is trained by its coordinates' list, so that the cost is a line in k; training whole
    tensors needs no list and takes 4 bytes a parameter less.
    """
    return [_measure(copy.deepcopy(model).train(), batch, share, repeats, seed) for share in shares]


def _measure(model: nn.Module, batch: Mapping[str, torch.Tensor], share: float, repeats: int, seed: int) -> StepCost:
    device = next(model.parameters()).device
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    generator = torch.Generator().manual_seed(seed)
    chosen, indices = [], 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scores = torch.rand(parameter.numel(), generator=generator)
        indexed = scores.topk(max(1, int(share * len(scores)))).indices.sort().values.to(device, torch.int32)
        chosen.append(SelectedParameter(name, parameter, indexed))
        indices += indexed.nbytes
    optimizer = SelectedAdamW(chosen, process_group="alone")

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # allocates the state
    peak = weights + indices + optimizer_bytes(optimizer) + peak_bytes(step, device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    optimizer.close()
    return StepCost(share, peak, min(seconds))


def fit_costs(shares: Sequence[float], costs: Sequence[float], parameters: int) -> CostFit:
    """Least squares of cost = parameters · (fixed + variable · share).

    >>> fit_costs([0.1, 0.5, 1.0], [1_200.0, 2_000.0, 3_000.0], parameters=100)
    CostFit(costs=CostModel(fixed=10.0, variable=20.0), error=0.0, parameters=100)

    Raises ConfigurationError where the cost does not rise with the share: then there is nothing to gain by training
    less, and no optimum.
    """
    if len(set(shares)) < 2:
        raise ConfigurationError("a line needs costs at two shares or more")
    x, y = np.array(shares), np.array(costs) / parameters
    variable, fixed = (float(value) for value in np.polyfit(x, y, 1))
    if variable <= 0 or fixed < 0:
        raise ConfigurationError(
            f"fixed = {fixed:.3g}, variable = {variable:.3g}: these costs do not rise with the share that is trained"
        )
    error = float(np.max(np.abs(fixed + variable * x - y) / y))
    # To digits, not to places: seconds per parameter are of the order of 1e-11.
    costs_per_parameter = CostModel(fixed=float(f"{fixed:.10g}"), variable=float(f"{variable:.10g}"))
    return CostFit(costs_per_parameter, round(error, 12), parameters)


def recommended_fraction(
    costs: CostModel,
    *,
    gamma: float | None = None,
    retained_mass: Sequence[tuple[float, float]] | None = None,
) -> BestFraction:
    """k*, the fraction with the most gain per cost under these costs.

    By the exponent `gamma` of Δ_k ≈ k^γ·Δ_full: k* = γ·a/(b·(1 − γ)), clipped to 1 (theory.best_fraction). Or off a
    measured curve [(k, share of the gradient's mass kept)…], as a blueprint's layer holds it: its point with the
    largest mass/(a + b·k). Prefer the curve; γ supposes a power law, which few layers follow.

    >>> recommended_fraction(CostModel(fixed=1, variable=4), gamma=0.5)
    BestFraction(fraction=0.25, regime=<Regime.PARTIAL: 'partial'>)
    >>> recommended_fraction(CostModel(fixed=1, variable=4), retained_mass=[(0.1, 0.3), (0.3, 0.6), (1.0, 1.0)])
    BestFraction(fraction=0.3, regime=<Regime.PARTIAL: 'partial'>)
    """
    if (gamma is None) == (retained_mass is None):
        raise ConfigurationError("give gamma or retained_mass, one of them")
    if gamma is not None:
        return best_fraction(gamma, costs.fixed, costs.variable)
    assert retained_mass is not None
    curve = [(k, mass) for k, mass in retained_mass if k > 0]
    k, _ = max([*curve, (1.0, 1.0)], key=lambda point: point[1] / cost(point[0], costs.fixed, costs.variable))
    return BestFraction(k, Regime.FULL if k == 1 else Regime.PARTIAL)
