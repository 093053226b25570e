"""What changed between two blueprints: per layer, in rank, and at the top."""

from __future__ import annotations

from decimal import Decimal

import anyio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import agreement, tables
from app.registry.blueprints import resolve
from app.registry.versions import get_version
from gradient_blueprints import models

_Side = tuple[models.VersionSummary, dict[str, float]]


async def compare(
    session: AsyncSession,
    model_id: str,
    base: tuple[Decimal, int | None],
    other: tuple[Decimal, int | None],
    *,
    lab: str | None = None,
    top: int | None = None,
) -> models.Comparison:
    """Compare two versions, each (checkpoint, version or None for the newest), by gradient norm.

    `top` defaults to a tenth of the base's layers, at least 1. Ranks are among all layers of each
    side; equal norms are ranked in the order of the layer ids.
    """
    left, right = [await _norms(session, model_id, checkpoint, number, lab) for checkpoint, number in (base, other)]
    return await anyio.to_thread.run_sync(_compared, left, right, top)


def _compared(base: _Side, other: _Side, top: int | None) -> models.Comparison:
    (base_version, base_norms), (other_version, other_norms) = base, other
    base_ranks, other_ranks = _ranks(base_norms), _ranks(other_norms)
    matched = [layer for layer in base_norms if layer in other_norms]
    size = top if top is not None else max(1, len(base_norms) // 10)
    base_top, other_top = _top(base_ranks, size), _top(other_ranks, size)
    of_base, of_other = [base_norms[layer] for layer in matched], [other_norms[layer] for layer in matched]
    return models.Comparison(
        base=base_version,
        other=other_version,
        layers=tuple(
            models.LayerChange(
                id=layer,
                base=base_norms.get(layer),
                other=other_norms.get(layer),
                ratio=_ratio(base_norms.get(layer), other_norms.get(layer)),
                base_rank=base_ranks.get(layer),
                other_rank=other_ranks.get(layer),
            )
            for layer in [*base_norms, *(layer for layer in other_norms if layer not in base_norms)]
        ),
        matched=len(matched),
        only_base=tuple(layer for layer in base_norms if layer not in other_norms),
        only_other=tuple(layer for layer in other_norms if layer not in base_norms),
        spearman=agreement.spearman(of_base, of_other),
        kendall=agreement.kendall(of_base, of_other),
        top=size,
        entered_top=tuple(layer for layer in other_top if layer not in base_top),
        left_top=tuple(layer for layer in base_top if layer not in other_top),
    )


async def _norms(
    session: AsyncSession, model_id: str, checkpoint: Decimal, number: int | None, lab: str | None
) -> _Side:
    found = await resolve(session, model_id, checkpoint, version=number, lab=lab)
    version = await get_version(session, model_id, checkpoint, found.version)
    rows = await session.execute(
        select(tables.Layer.layer_id, tables.Layer.gradient_norm)
        .where(tables.Layer.document_id == found.document_id)
        .order_by(tables.Layer.position)
    )
    return version.summary, dict(rows.all())


def _ranks(norms: dict[str, float]) -> dict[str, int]:
    ordered = sorted(norms, key=lambda layer: (-norms[layer], layer))
    return {layer: rank for rank, layer in enumerate(ordered, start=1)}


def _top(ranks: dict[str, int], size: int) -> list[str]:
    return sorted((layer for layer, rank in ranks.items() if rank <= size), key=ranks.__getitem__)


def _ratio(base: float | None, other: float | None) -> float | None:
    if base is None or other is None or base == 0:
        return None
    ratio = other / base
    return ratio if ratio - ratio == 0 else None  # a quotient beyond float64 is no number to report
