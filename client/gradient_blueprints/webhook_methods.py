"""The methods of both clients on webhooks, each written once."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from gradient_blueprints.calls import Connected, built, listing, method
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.transport import Request, Steps, Stream
from gradient_blueprints.webhook_models import (
    IssuedWebhook,
    NewWebhook,
    Webhook,
    WebhookDelivery,
    WebhookDeliveryPage,
    WebhookEvent,
    WebhookPage,
)


class WebhookMethods(Connected):
    """Hear of what happens without asking again and again."""

    @method
    def create_webhook(
        self, url: str, events: Iterable[WebhookEvent | str], *, model_id: str | None = None
    ) -> Steps[IssuedWebhook]:
        """Have the registry POST a signed message to `url` at each of `events` (scope publish or profile).

        Of the models that your lab owns, or of `model_id`, whoever owns it. `secret` of the answer is told this once.

            webhook = client.create_webhook("https://example.org/hooks", ["job.finished", "evidence.stale"])
            webhook.secret  # what a receiver verifies the messages with
        """
        body = built(NewWebhook, url=url, events=tuple(events), model_id=model_id)
        return (yield from self._write(IssuedWebhook, "POST", "/v1/webhooks", body))

    @listing
    def list_webhooks(self, *, limit: int | None = None) -> Stream[Webhook]:
        """Those of your lab, without their secrets; of every lab for an administrator."""
        yield from self._pages(WebhookPage, "webhooks", "/v1/webhooks", {}, limit)

    @method
    def delete_webhook(self, webhook_id: str | uuid.UUID) -> Steps[None]:
        """End a webhook, with the messages that wait for it."""
        yield from self._exchange(Request("DELETE", _path(webhook_id), repeatable=False))

    @method
    def test_webhook(self, webhook_id: str | uuid.UUID) -> Steps[WebhookDelivery]:
        """Have a message `webhook.test` sent; `list_webhook_deliveries` tells how it fared."""
        return (yield from self._write(WebhookDelivery, "POST", f"{_path(webhook_id)}/test"))

    @listing
    def list_webhook_deliveries(
        self, webhook_id: str | uuid.UUID, *, limit: int | None = None
    ) -> Stream[WebhookDelivery]:
        """The messages of a webhook, newest first, each with its attempts."""
        yield from self._pages(WebhookDeliveryPage, "deliveries", f"{_path(webhook_id)}/deliveries", {}, limit)


def _path(webhook_id: str | uuid.UUID) -> str:
    try:
        return f"/v1/webhooks/{uuid.UUID(str(webhook_id))}"
    except ValueError:
        raise ConfigurationError(f"{webhook_id!r} is not the id of a webhook: give a UUID.") from None
