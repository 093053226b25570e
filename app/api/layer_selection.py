"""What to train: Algorithm 1 from posted local norms and a budget."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import CheckpointPath, Reader, Session
from app.api.problems import documented
from app.registry import layer_selection
from gradient_blueprints.selection_models import LayerSelection, SelectionRequest

router = APIRouter(tags=["selection"])


@router.post(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/selection",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def select_layers(
    session: Session, reader: Reader, model_id: str, checkpoint: CheckpointPath, request: SelectionRequest
) -> LayerSelection:
    """Choose whole layers, or a fraction of each, that a budget pays for; nothing of the request is kept."""
    return await layer_selection.select_layers(session, model_id, checkpoint, request)
