"""Sends what waits for webhooks: signed, to public addresses, several webhooks at a time. A part of the relay."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpcore2
from pydantic import SecretStr
from standardwebhooks import Webhook as Signer

from app.database import Sessions
from app.registry.webhook_deliveries import Attempt, Outcome, begin_attempt, end_attempt
from app.registry.webhooks import secret_of
from app.settings import Settings
from gradient_blueprints.addresses import AddressRefused, Network, check_address

logger = logging.getLogger(__name__)

AT_ONCE = 8
CONNECT_SECONDS = 5.0
ATTEMPT_SECONDS = 15.0
STOP_SECONDS = 5.0
SOON = 5.0  # seconds: a retry that the relay's own polling would be late for
USER_AGENT = "gradient-blueprints"
FAULT_LENGTH = 300


class PublicBackend(httpcore2.AnyIOBackend):
    """Connects to public addresses and those of `networks` alone, however a name answers, and looks at what it got."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the base class has it so
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Asks for the name once and connects to an address that it gave: a second answer cannot be another."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(f"the name {host} is not known: {error}") from error
        failure: Exception = httpcore2.ConnectError(f"the name {host} has no address")
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            try:
                check_address(address, self._networks)
                stream = await super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (AddressRefused, httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                await self.check_peer(stream)
                return stream
        raise failure

    async def check_peer(self, stream: httpcore2.AsyncNetworkStream) -> None:
        """AddressRefused, and the connection closed, unless the other end is where a message may go."""
        peer = stream.get_extra_info("server_addr")
        try:
            check_address(str(peer[0]), self._networks)
        except AddressRefused:
            await stream.aclose()
            raise


class WebhookSender:
    """Attempts begun and ended in transactions of their own; the message is sent between the two, holding none."""

    def __init__(self, settings: Settings, sessions: Sessions, awake: asyncio.Event) -> None:
        self._settings = settings
        self._sessions = sessions
        self._awake = awake
        self._running: set[asyncio.Task[None]] = set()
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            network_backend=PublicBackend(settings.webhook_networks),
            max_connections=AT_ONCE,
            keepalive_expiry=30,
        )

    async def begin_due(self) -> bool:
        """Begin what is due and has room. False: what more there is, a finished attempt or a notification tells."""
        while len(self._running) < AT_ONCE:
            async with self._sessions.begin() as session:
                attempt = await begin_attempt(session)
            if attempt is None:
                break
            task = asyncio.create_task(self._make(attempt), name=f"webhook {attempt.webhook_id}")
            self._running.add(task)
            task.add_done_callback(self._ended)
        return False

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._awake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: its end was not written down and it will be tried again: %s", task.get_name(), error)

    async def close(self) -> None:
        """Give what runs a moment. A message whose arrival is not written down is sent again, under the same id."""
        if self._running:
            await asyncio.wait(self._running, timeout=STOP_SECONDS)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._pool.aclose()

    async def _make(self, attempt: Attempt) -> None:
        outcome = await self._send(attempt)
        async with self._sessions.begin() as session:
            again = await end_attempt(session, attempt, outcome, retry_seconds=self._settings.webhook_retry_seconds)
        how = "arrived" if outcome.arrived else f"attempt {attempt.number} failed: {outcome.fault or outcome.status}"
        logger.info("webhook %s: %s %s", attempt.webhook_id, attempt.message_id, how)
        if again is not None and again <= SOON:
            asyncio.get_running_loop().call_later(again, self._awake.set)

    async def _send(self, attempt: Attempt) -> Outcome:
        try:
            async with (
                asyncio.timeout(ATTEMPT_SECONDS),
                self._pool.stream(
                    "POST",
                    attempt.url,
                    headers=signed_headers(attempt, self._settings.secret),
                    content=attempt.body.encode(),
                    extensions={"timeout": {"connect": CONNECT_SECONDS}},
                ) as answer,
            ):
                return Outcome(status=answer.status, fault=_fault_of(answer.status))
        except TimeoutError:
            return Outcome(fault=f"no answer within {ATTEMPT_SECONDS:g} seconds")
        except Exception as error:  # noqa: BLE001, RUF100 - whatever the other side made of it, the attempt has failed
            return Outcome(fault=f"{type(error).__name__}: {' '.join(str(error).split())}"[:FAULT_LENGTH])


def _fault_of(status: int) -> str | None:
    return "redirects are not followed; give the URL that it leads to" if 300 <= status < 400 else None


def signed_headers(attempt: Attempt, pepper: SecretStr) -> list[tuple[str, str]]:
    """https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""
    now = datetime.now(UTC)
    signature = Signer(secret_of(attempt.webhook_id, pepper)).sign(attempt.message_id, now, attempt.body)
    return [
        ("Host", urlsplit(attempt.url).netloc),
        ("Content-Type", "application/json"),
        ("User-Agent", USER_AGENT),
        ("webhook-id", attempt.message_id),
        ("webhook-timestamp", str(int(now.timestamp()))),
        ("webhook-signature", signature),
    ]
