"""The wire types of webhooks: what a lab wants to hear of, and how its messages fared."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from gradient_blueprints.models import LabName, ModelId, Page, Wire

TEST_EVENT = "webhook.test"


class WebhookEvent(StrEnum):
    """What a webhook may hear of."""

    BLUEPRINT_PUBLISHED = "blueprint.published"
    BLUEPRINT_YANKED = "blueprint.yanked"
    ALIAS_MOVED = "alias.moved"
    EVIDENCE_STALE = "evidence.stale"
    JOB_FINISHED = "job.finished"


class DeliveryState(StrEnum):
    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


def _plain_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise PydanticCustomError("invalid_url", "give a URL such as https://example.org/hooks/blueprints")
    if "@" in parts.netloc or parts.fragment:
        raise PydanticCustomError("invalid_url", "a webhook's URL has no user, password or fragment")
    return url


WebhookUrl = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[\x21-\x7e]+$", max_length=2_000),
    AfterValidator(_plain_url),
    Field(examples=["https://example.org/hooks/blueprints"]),
]


class NewWebhook(Wire):
    url: WebhookUrl
    events: Annotated[tuple[WebhookEvent, ...], Field(min_length=1, max_length=len(WebhookEvent))]
    model_id: ModelId | None = Field(
        None, description="hear of this model, whoever owns it; of all models that your lab owns if unset"
    )


class Webhook(Wire):
    """A webhook as the registry shows it, without its secret."""

    id: UUID
    lab: LabName
    url: str
    events: tuple[WebhookEvent, ...]
    model_id: ModelId | None = None
    key_prefix: str = Field(description="of the key that made it, and that it ends with")
    created_at: datetime
    ended: str | None = Field(None, description="why nothing is sent to it any more")


class IssuedWebhook(Webhook):
    """The only answer that holds the secret, which signs every message (Standard Webhooks)."""

    secret: str = Field(repr=False)


class WebhookPage(Page):
    webhooks: tuple[Webhook, ...]


class WebhookAttempt(Wire):
    """One attempt to send a message; without an end while it lasts, or when what sent it was killed."""

    number: int
    began_at: datetime
    ended_at: datetime | None = None
    status: int | None = Field(None, description="of the answer")
    fault: str | None = None


class WebhookDelivery(Wire):
    id: str = Field(description="as the message's header webhook-id tells it")
    event: str
    state: DeliveryState
    created_at: datetime
    due_at: datetime | None = Field(None, description="when it is tried next, at the earliest")
    finished_at: datetime | None = None
    attempts: tuple[WebhookAttempt, ...] = ()


class WebhookDeliveryPage(Page):
    deliveries: tuple[WebhookDelivery, ...]
