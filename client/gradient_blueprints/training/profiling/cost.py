"""What a profile will cost, before it starts: FLOPs and memory from the model's shapes, seconds from one batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.experts import routed_shares
from gradient_blueprints.training.profiling.losses import Batch
from gradient_blueprints.training.profiling.profiler import GradientProfiler
from gradient_blueprints.training.profiling.state import Statistics


@dataclass(frozen=True)
class CostEstimate:
    """The cost of so many batches: matrix products with weights; attention scores, norms and the like are left out."""

    batches: int
    flops: float
    """Of the whole profile."""
    over_training: float
    """Over a forward and backward pass with its weight gradients."""
    over_validation: float
    """Over a forward pass without gradients: what a lab's validation costs anyway."""
    weight_bytes: int
    sum_bytes: int
    """Float32 sums of the general domain and the batch at hand; 4 bytes a parameter for every further domain."""
    activation_bytes: int | None
    """What autograd holds between forward and backward of one batch, as the probe found; None without one."""
    seconds: float | None
    """Batches times the seconds of the probe; None without one."""

    def __str__(self) -> str:
        gib = (self.weight_bytes + self.sum_bytes + (self.activation_bytes or 0)) / 2**30
        memory = f"{gib:.2f} GiB" if gib >= 0.1 else f"{2**10 * gib:.2f} MiB"
        time_needed = "" if self.seconds is None else f", about {self.seconds:,.0f} s"
        return (
            f"{self.batches:,} batches: {self.flops:.3g} FLOPs, {self.over_training:.2f} times training on them and "
            f"{self.over_validation:.1f} times validating{time_needed}, {memory}"
        )


def estimate_cost(
    model: nn.Module,
    batch_shape: tuple[int, int],
    batches: int,
    *,
    statistics: Statistics = "all",
    probe: Batch | None = None,
    timed: bool = True,
) -> CostEstimate:
    """What profiling `batches` batches of `batch_shape` = (examples, positions) will take.

    A weight (d, p) costs 2·T·d·p forward and as much for the gradient of its input; its norms cost
    min(1, T(1/d + 1/p)) of that again, by Gram matrices or written out, so that with w the weight's share
    of all, profiling costs (2 + Σ w·min(1, T(1/d + 1/p)))/3 of training; with batch statistics the
    batch's gradient comes on top where it is not had by writing out.

    Time is that of one batch, the `probe`, by default of random tokens, run once to warm up and once
    on the clock; `timed=False` runs nothing. Experts of mixtures count as far as tokens reach them.

    >>> print(estimate_cost(model, (8, 512), batches=200))                            # doctest: +SKIP
    200 batches: 1.38e+15 FLOPs, 1.04 times training on them and 3.1 times validating, about 800 s, 4.11 GiB
    """
    examples, length = batch_shape
    if min(examples, length, batches) < 1:
        raise ConfigurationError("A cost is of at least one batch of one example of one position.")
    forward, norms = 0.0, 0.0
    for rows, columns, share, uses in _weights(model):
        product = 2.0 * examples * length * rows * columns * share
        forward += product
        norms += product * _norm_share(length * share, rows, columns, examples, uses, totals=statistics != "examples")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds, activations = _probed(model, batch_shape, statistics, probe) if timed else (None, None)
    return CostEstimate(
        batches=batches,
        flops=(2 * forward + norms) * batches,
        over_training=(2 * forward + norms) / (3 * forward) if forward else 1.0,
        over_validation=(2 * forward + norms) / forward if forward else 1.0,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        sum_bytes={"all": 12 * parameters, "batches": 0, "examples": 0}[statistics],
        activation_bytes=activations,
        seconds=None if seconds is None else seconds * batches,
    )


def _weights(model: nn.Module) -> Iterator[tuple[int, int, float, int]]:
    """Rows, columns, share of the positions that reach it, and uses of every matrix that is multiplied with."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    shares = routed_shares(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            reached = shares.get(parameter, 1.0) or 1.0
            if parameter.dim() == 3 and parameter in shares:  # one matrix an expert
                for _ in range(parameter.shape[0]):
                    yield parameter.shape[1], parameter.shape[2], reached, 1
            elif parameter.dim() > 1:
                yield parameter.shape[0], parameter[0].numel(), reached, uses[id(parameter)]


def _norm_share(length: float, rows: int, columns: int, examples: int, uses: int, *, totals: bool) -> float:
    """Cost of a weight's norms over that of its product, as `contributions.Outer` chooses the way."""
    ghost = length * (1 / rows + 1 / columns)
    if not totals:
        return min(1.0, ghost)
    if uses > 1:  # a tied head needs its Gram matrices for the cross term
        return min(1.0, ghost) + 1
    return 1.0 if examples == 1 or ghost > 1 / 4 else ghost + 1


def _probed(
    model: nn.Module, batch_shape: tuple[int, int], statistics: Statistics, probe: Batch | None
) -> tuple[float, int]:
    """Seconds of one batch, and the bytes that autograd keeps for it."""
    if probe is None:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            raise ConfigurationError("Give a probe batch: the model has no table of tokens to draw one from.")
        generator = torch.Generator().manual_seed(0)
        probe = {"input_ids": torch.randint(embeddings.num_embeddings, batch_shape, generator=generator)}
    kept: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with GradientProfiler(model, statistics=statistics, verify=False, digests=False) as profiler:
        profiler.step(probe)
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            profiler.step(probe)
        return time.perf_counter() - began, sum(kept.values())
