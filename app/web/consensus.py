"""The page of what the labs say together about one checkpoint, and where they disagree."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.aggregation import Snapshot
from app.api.dependencies import CheckpointPath, checkpoint_of
from app.registry import aggregation, blueprints, catalog
from app.web import drawings, pictures
from app.web.drawings import Bar
from app.web.layer_tables import Column, Ordered, arrange
from app.web.rendering import exponential, in_thread, render
from app.web.session import Viewer
from gradient_blueprints.models import ModelId
from gradient_blueprints.statistics_models import AggregateResult, Aggregation, Consensus, ConsensusLayer

router = APIRouter(include_in_schema=False)


def _interval(layer: ConsensusLayer) -> tuple[float, float] | None:
    """One spread of the labs to either side, on the logarithm."""
    if layer.spread is None or not layer.gradient_norm:
        return None
    factor = exponential(layer.spread)
    return layer.gradient_norm / factor, min(layer.gradient_norm * factor, sys.float_info.max)


def _spread_factor(layer: ConsensusLayer) -> float | None:
    return None if layer.spread is None else exponential(layer.spread)


_COLUMNS = [
    Column("id", "Layer", lambda layer: layer.id, "text"),
    Column("kind", "Kind", lambda layer: layer.kind and layer.kind.replace("_", " "), "text"),
    Column(
        "rank", "Rank", lambda layer: layer.rank, "count", about="1 is the largest; only layers that most labs report"
    ),
    Column(
        "gradient_norm",
        "Gradient norm",
        lambda layer: layer.gradient_norm,
        interval=_interval,
        drawn=True,
        about="weighted median of the labs, their scales taken out; the interval is one spread to either side",
    ),
    Column(
        "spread", "Labs differ by", _spread_factor, about="factor of one spread: e to the 1.4826 MAD of the logarithms"
    ),
    Column(
        "i_squared",
        "I²",
        lambda layer: layer.i_squared,
        "percent",
        about="variance that the labs' intervals do not explain",
    ),
    Column("labs", "Labs", lambda layer: layer.labs, "count"),
    Column("influence", "Most influential", lambda layer: layer.influence and layer.influence.lab, "text"),
    Column(
        "factor",
        "Without it",
        lambda layer: layer.influence and layer.influence.factor,
        about="the estimate without that lab, as a multiple of it",
    ),
]


async def _consensus(session: AsyncSession, model_id: str, checkpoint: Decimal) -> Consensus:
    wanted = Aggregation(result=AggregateResult.CONSENSUS, models=(model_id,), checkpoints=(float(checkpoint),))
    async for consensus in aggregation.consensuses(session, wanted):
        return consensus
    raise await blueprints.explain_miss(session, model_id, checkpoint, lab=blueprints.ANY_LAB)


@router.get("/pictures/consensus.svg")
async def draw_consensus(
    session: Snapshot,
    viewer: Viewer,
    model_id: Annotated[ModelId, Query()],
    checkpoint: Annotated[str, Query(max_length=32)],
    narrow: bool = False,
) -> Response:
    consensus = await _consensus(session, model_id, checkpoint_of(checkpoint, "/query/checkpoint"))

    def drawn() -> bytes:
        bars = drawings.largest(
            Bar.of(position, layer, _interval(layer)) for position, layer in enumerate(consensus.layers)
        )
        return drawings.draw_norms(bars, "consensus norm", narrow=narrow)

    return await pictures.answer(session, drawn, cache_control="private, no-cache")


@router.get("/models/{model_id:model}/checkpoints/{checkpoint}/consensus")
async def consensus_page(
    request: Request, session: Snapshot, viewer: Viewer, order: Ordered, model_id: str, checkpoint: CheckpointPath
) -> Response:
    """Each lab's newest version that is not yanked has a voice."""
    await catalog.get_model(session, model_id)
    consensus = await _consensus(session, model_id, checkpoint)

    def rendered() -> Response:
        disputed = sorted(
            (layer for layer in consensus.layers if layer.spread is not None), key=lambda one: -(one.spread or 0)
        )
        return render(
            request,
            "consensus.html",
            consensus=consensus,
            disputed=disputed[:5],
            public=request.app.state.settings.public_reads,
            table=arrange("layers", _COLUMNS, consensus.layers, order, first=("gradient_norm", True)),
        )

    return await in_thread(session, rendered)
