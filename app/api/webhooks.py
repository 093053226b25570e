"""Webhooks of a lab, and how their messages fared."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from app.api.dependencies import CurrentSettings, Cursor, Limit, Reader, Session, requires
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import webhooks
from app.registry.callers import Caller
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints.models import Scope
from gradient_blueprints.webhook_models import (
    IssuedWebhook,
    NewWebhook,
    WebhookDelivery,
    WebhookDeliveryPage,
    WebhookPage,
)

router = APIRouter(tags=["webhooks"])
Contributor = Annotated[Caller, Depends(requires(Scope.PUBLISH, Scope.PROFILE))]


@router.post("/v1/webhooks", status_code=201, response_model_exclude_none=True, responses=documented(409))
async def create_webhook(
    session: Session, settings: CurrentSettings, reader: Reader, caller: Contributor, new: NewWebhook
) -> IssuedWebhook:
    """Have a signed message sent at each of these events. The secret is in this answer and nowhere else."""
    return await webhooks.create_webhook(session, caller, new, settings.secret, networks=settings.webhook_networks)


@router.get("/v1/webhooks", response_model_exclude_none=True, responses=documented())
async def list_webhooks(
    request: Request,
    response: Response,
    session: Session,
    caller: Contributor,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> WebhookPage:
    """Those of your lab; of every lab for an administrator."""
    return with_links(request, response, await webhooks.list_webhooks(session, caller, limit=limit, cursor=cursor))


@router.delete("/v1/webhooks/{webhook_id}", status_code=204, responses=documented(404))
async def delete_webhook(session: Session, caller: Contributor, webhook_id: UUID) -> None:
    """End a webhook, with the messages that wait for it and the record of those before."""
    await webhooks.delete_webhook(session, caller, webhook_id)


@router.post(
    "/v1/webhooks/{webhook_id}/test", status_code=202, response_model_exclude_none=True, responses=documented(404)
)
async def test_webhook(session: Session, caller: Contributor, webhook_id: UUID) -> WebhookDelivery:
    """Have a message `webhook.test` sent to it."""
    return await webhooks.send_test(session, caller, webhook_id)


@router.get("/v1/webhooks/{webhook_id}/deliveries", response_model_exclude_none=True, responses=documented(404))
async def list_deliveries(
    request: Request,
    response: Response,
    session: Session,
    caller: Contributor,
    webhook_id: UUID,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> WebhookDeliveryPage:
    """Its messages, newest first, each with its attempts."""
    page = await webhooks.list_deliveries(session, caller, webhook_id, limit=limit, cursor=cursor)
    return with_links(request, response, page)
