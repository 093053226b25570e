"""Algorithm 1 on the server: which layers, or which fraction of each, a budget pays for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from decimal import Decimal
from statistics import fmean, stdev

import anyio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.blueprints import Found, resolve
from gradient_blueprints.allocation import (
    BYTES_PER_DENSE_PARAMETER,
    Allocation,
    Budget,
    allocate,
    bytes_each,
    count,
    criterion_value,
    validity_of,
)
from gradient_blueprints.errors import ConfigurationError, InvalidRequest
from gradient_blueprints.models import Layer
from gradient_blueprints.selection_models import (
    Criterion,
    LayerSelection,
    LayerShare,
    SelectionRequest,
    SelectionUnit,
)
from gradient_blueprints.statistics_models import LocalLayer, LocalSample

_MOST_WORK = 2_000_000
"""Of the knapsack, which is NP-hard: about two seconds. Layers of real models need a hundredth."""
_STATISTICS = {
    Criterion.NORM: "gradient_norm",
    Criterion.SIZE_NORMALISED: "gradient_norm",
    Criterion.SIGNAL: "signal",
}


async def select_layers(
    session: AsyncSession, model_id: str, checkpoint: Decimal, request: SelectionRequest
) -> LayerSelection:
    """Blend the published with the posted norms and spend the budget."""
    found = await resolve(session, model_id, checkpoint, lab=request.lab, version=request.version)
    layer = tables.Layer
    rows = await session.execute(
        select(
            layer.layer_id,
            layer.gradient_norm,
            layer.gradient_norm_low,
            layer.gradient_norm_high,
            layer.signal,
            layer.first_order,
            layer.k_star,
            layer.parameters,
        )
        .where(layer.document_id == found.document_id)
        .order_by(layer.layer_id)
    )
    published = [
        Layer(
            id=row.layer_id,
            gradient_norm=row.gradient_norm,
            gradient_norm_ci=None if row.gradient_norm_low is None else (row.gradient_norm_low, row.gradient_norm_high),
            signal=row.signal,
            first_order=row.first_order,
            k_star=row.k_star,
            parameters=row.parameters,
        )
        for row in rows
    ]
    return await anyio.to_thread.run_sync(_choose, found, published, request, abandon_on_cancel=True)


def _choose(found: Found, published: Sequence[Layer], request: SelectionRequest) -> LayerSelection:
    local = None if request.local is None else _local_layers(request.local, request.criterion)
    counted = {} if request.local is None else {layer.id: layer.parameters for layer in request.local.layers}
    sizes = []
    for layer in published:
        size = layer.parameters if layer.parameters is not None else counted.get(layer.id)
        if size is None:
            raise InvalidRequest(
                f"The blueprint does not say how many parameters {layer.id!r} has; give `parameters` in `local`."
            )
        sizes.append(size)
    value = criterion_value(request.criterion, dict(zip((layer.id for layer in published), sizes, strict=True)))
    budget = Budget(request.budget.amount, request.budget.measure)

    def spend(budget: Budget) -> Allocation:
        return allocate(
            published,
            local,
            sizes,
            budget,
            request.unit,
            value=value,
            trust=request.trust,
            validity=1.0 if request.groups is not None else validity_of(request.verdict),
            groups=request.groups,
            most_work=_MOST_WORK,
        )

    try:
        allocation = spend(budget)
    except ConfigurationError as unfit:
        raise InvalidRequest(f"{unfit}.") from unfit
    layers = tuple(
        LayerShare(id=layer.id, parameters=size, fraction=fraction, share=share, selected=count(fraction, size))
        for layer, size, fraction, share in zip(published, sizes, allocation.fractions, allocation.shares, strict=True)
    )
    selected = sum(layer.selected for layer in layers)
    if not selected:
        what = "layer" if request.unit == "layer" else "coordinate"  # how long rows are, no blueprint says
        least = _least(spend(Budget.parameters(1)), sizes, request.unit)
        raise InvalidRequest(
            f"The budget of {budget.amount:g} ({budget.measure}) does not pay for one {what} anywhere: "
            + ("the layers hold no parameters." if least is None else f"the least that does is {least} (parameters).")
        )
    return LayerSelection(
        model_id=found.model_id,
        training_checkpoint=float(found.checkpoint),
        version=found.version,
        lab=found.lab,
        digest=found.digest_text,
        unit=request.unit,
        criterion=request.criterion,
        trust=allocation.trust,
        exact=allocation.exact,
        parameters=sum(sizes),
        selected=selected,
        training_bytes=sum(
            layer.selected * bytes_each("layer" if layer.fraction == 1 else request.unit, copies=False)
            for layer in layers
        ),
        full_bytes=sum(sizes) * BYTES_PER_DENSE_PARAMETER,
        layers=layers,
    )


def _least(of_one: Allocation, sizes: Sequence[int], unit: SelectionUnit) -> int | None:
    """The fewest parameters with which something is chosen, from what a budget of one does; None where none are."""
    if unit == "layer":
        return min((size for size, share in zip(sizes, of_one.shares, strict=True) if size and share > 0), default=None)
    most = max(fraction * size for fraction, size in zip(of_one.fractions, sizes, strict=True))
    return math.ceil((1 - 1e-6) / most) if most else None  # 1e-6: as `count` rounds


def _local_layers(local: LocalSample, criterion: Criterion) -> list[Layer]:
    """The local sample as layers that hold the criterion's statistic."""
    wanted = _STATISTICS.get(criterion)
    if wanted is None:
        raise InvalidRequest(f"A local sample holds norms, no {criterion}; leave `local` away, or take criterion norm.")
    if local.statistic != wanted:
        raise InvalidRequest(f"The criterion {criterion} needs a local sample of {wanted}, not of {local.statistic}.")
    layers = []
    for layer in local.layers:
        value, interval = _value(layer)
        norm = {"gradient_norm": value, "signal": value if wanted == "signal" else None, "gradient_norm_ci": interval}
        layers.append(Layer.model_validate({"id": layer.id, "parameters": layer.parameters, **norm}))
    return layers


def _value(layer: LocalLayer) -> tuple[float, tuple[float, float] | None]:
    """The value over the sample and its 95 % interval, at least 0: of batches mean ± 1.96 standard errors.

    Of a value beside batches ± as large a share of it as that of their mean; batches that are all zero tell none.
    """
    if layer.batches is None:
        assert layer.value is not None, "a layer has batches or a value"
        return layer.value, layer.interval
    unit = max(layer.batches) or 1.0  # so that no sum leaves float64
    batches = [batch / unit for batch in layer.batches]
    mean = fmean(batches)
    value = unit * mean if layer.value is None else layer.value
    if len(batches) < 2 or not mean:
        return value, layer.interval
    margin = value * (1.96 * stdev(batches) / (mean * math.sqrt(len(batches))))
    return value, (max(0.0, value - margin), min(value + margin, sys.float_info.max))
