"""The page that compares two blueprints of a model."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.catalog import SIDE, side_of
from app.api.dependencies import LabQuery, Session
from app.registry import catalog, comparison, publications
from app.web import drawings, pictures
from app.web.drawings import Change
from app.web.layer_tables import Column, Ordered, arrange
from app.web.rendering import in_thread, render
from app.web.session import Viewer
from gradient_blueprints.models import MAX_LAYERS, Comparison, LayerChange, ModelId, VersionSummary, format_checkpoint

router = APIRouter(include_in_schema=False)
_CHOICES = 100
Top = Annotated[int | None, Query(ge=1, le=MAX_LAYERS)]


def _rank_change(layer: LayerChange) -> int | None:
    if layer.base_rank is None or layer.other_rank is None:
        return None
    return layer.base_rank - layer.other_rank


_COLUMNS = [
    Column("id", "Layer", lambda layer: layer.id, "text"),
    Column("base", "Base norm", lambda layer: layer.base),
    Column("other", "Other norm", lambda layer: layer.other),
    Column("ratio", "Other / base", lambda layer: layer.ratio),
    Column("base_rank", "Base rank", lambda layer: layer.base_rank, "count"),
    Column("other_rank", "Other rank", lambda layer: layer.other_rank, "count"),
    Column("rank_change", "Ranks gained", _rank_change, "signed"),
]


@router.get("/pictures/comparison.svg")
async def draw_comparison(
    session: Session,
    viewer: Viewer,
    model_id: Annotated[ModelId, Query()],
    base: Annotated[str, SIDE],
    other: Annotated[str, SIDE],
    top: Top = None,
    narrow: bool = False,
) -> Response:
    found = await comparison.compare(session, model_id, *_sides(base, other), top=top)
    return await pictures.answer(session, lambda: _drawn(found, narrow=narrow), cache_control="private, no-cache")


def _sides(base: str, other: str) -> tuple[tuple[Decimal, int | None], tuple[Decimal, int | None]]:
    return side_of(base, "/query/base"), side_of(other, "/query/other")


def _drawn(found: Comparison, *, narrow: bool) -> bytes:
    entered, left = set(found.entered_top), set(found.left_top)
    both = [layer for layer in found.layers if layer.base is not None and layer.other is not None]
    both.sort(key=lambda layer: -(layer.base or 0))
    changes: tuple[Change, ...] = tuple(
        (
            drawings.drawable(layer.base or 0),
            drawings.drawable(layer.other or 0),
            "entered" if layer.id in entered else "left" if layer.id in left else "stays",
        )
        for layer in both[: drawings.MOST_POINTS]
    )
    return drawings.draw_comparison(changes, name_of(found.base), name_of(found.other), narrow=narrow)


def name_of(version: VersionSummary) -> str:
    return f"{format_checkpoint(version.training_checkpoint)}@{version.version}"


@router.get("/models/{model_id:model}/compare")
async def comparison_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    order: Ordered,
    model_id: str,
    base: Annotated[str | None, SIDE] = None,
    other: Annotated[str | None, SIDE] = None,
    lab: LabQuery = None,
    top: Top = None,
) -> Response:
    """Two versions, each CHECKPOINT or CHECKPOINT@VERSION; without them the form alone."""
    model = await catalog.get_model(session, model_id)
    choices = await publications.list_latest_versions(session, model_id, limit=_CHOICES)
    found = (
        await comparison.compare(session, model_id, *_sides(base, other), lab=lab, top=top) if base and other else None
    )

    def rendered() -> Response:
        return render(
            request,
            "comparison.html",
            model=model,
            choices=choices,
            base=name_of(found.base) if found else base,
            other=name_of(found.other) if found else other,
            top=top,
            found=found,
            table=arrange("layers", _COLUMNS, found.layers, order, first=("rank_change", True)) if found else None,
        )

    return await in_thread(session, rendered)
