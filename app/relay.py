"""The relay: hands the outbox to the broker, messages to webhooks, and sweeps up what a lost worker or broker left.

Any number may run: rows are taken with SKIP LOCKED, and every transition is a conditional update.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import anyio
from celery import Celery

from app import relay_metrics
from app.database import Sessions, create_engine, create_sessions
from app.notifications import listen
from app.registry import idempotency, job_parts, outbox, webhook_deliveries, webhooks
from app.registry.outbox import Announcement
from app.settings import Settings
from app.webhook_sender import WebhookSender
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import MAX_TIME_LIMIT, PROFILE_QUEUE
from gradient_blueprints.tracing import current_traceparent, span

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # a notification wakes the relay at once; this is for the one that got lost
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
BROKER_TIMEOUT = 5.0
BEAT_SECONDS = 5.0
STUCK_SECONDS = 120.0  # well above what any step may take: statements and calls of the broker have their own limits


def main(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; what was begun is finished or rolled back first."""
    if settings.broker_url is None:
        raise ConfigurationError(
            "The relay needs a broker: set BLUEPRINTS_BROKER_URL, such as redis://127.0.0.1:6379/0."
        )
    if settings.relay_metrics is not None:
        relay_metrics.serve_metrics(settings.relay_metrics)
    asyncio.run(Relay(settings, settings.broker_url).run())


def producer(broker_url: str) -> Celery:
    """Sends messages and nothing else. Retries are the relay's own, so the client's are off: they would block it."""
    celery = Celery("gradient-blueprints", broker=broker_url, set_as_current=False)
    celery.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_default_queue=PROFILE_QUEUE,
        task_publish_retry=False,
        broker_connection_timeout=BROKER_TIMEOUT,
        broker_transport_options={
            # the same as the worker's: whoever has the shortest one hands out again what others still work on
            "visibility_timeout": MAX_TIME_LIMIT + 86_400,
            "socket_connect_timeout": BROKER_TIMEOUT,
            "socket_timeout": BROKER_TIMEOUT,
            "max_retries": 0,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
        },
    )
    return celery


def _waking(awake: asyncio.Event) -> Callable[[str], None]:
    return lambda _: awake.set()


class Relay:
    def __init__(self, settings: Settings, broker_url: str) -> None:
        self._settings = settings
        self._celery = producer(broker_url)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="broker")  # the broker's client blocks
        self._awake = asyncio.Event()
        self._webhooks_awake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._begun: dict[str, float] = {}  # when each part that is in a step began it

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        engine = create_engine(self._settings)
        sessions = create_sessions(engine)
        sender = WebhookSender(self._settings, sessions, self._webhooks_awake)
        listeners = [
            asyncio.create_task(listen(self._settings.database_url, channel, _waking(awake)))
            for channel, awake in ((outbox.OUTBOX_CHANNEL, self._awake), (webhooks.CHANNEL, self._webhooks_awake))
        ]
        logger.info("relay: running")
        try:
            await asyncio.gather(
                self._repeat("relay", lambda: self._send(sessions), self._awake, POLL_SECONDS),
                self._repeat("sweeper", lambda: self._sweep(sessions), None, self._settings.sweep_seconds),
                self._repeat("webhooks", sender.begin_due, self._webhooks_awake, POLL_SECONDS),
                self._beat(),
            )
        finally:
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
            await sender.close()
            self._thread.shutdown()
            self._celery.close()
            await engine.dispose()
        logger.info("relay: stopped")

    def _stop(self) -> None:
        self._stopping.set()
        self._awake.set()
        self._webhooks_awake.set()

    async def _repeat(
        self, name: str, step: Callable[[], Awaitable[bool]], awake: asyncio.Event | None, pause: float
    ) -> None:
        """Run `step` until told to stop: again at once while it says there is more, backing off while it fails."""
        failures = 0
        while not self._stopping.is_set():
            if awake is not None:
                awake.clear()
            try:
                more = await self._take(name, step)
            except Exception as error:  # the database or the broker is away: any error is one to outlive
                failures += 1
                relay_metrics.FAILURES.labels(name).inc()
                wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1))
                logger.warning("%s: %s; trying again in %.1f s", name, error or type(error).__name__, wait)
                await self._rest(None, wait)
            else:
                if failures:
                    logger.info("%s: working again", name)
                failures = 0
                if not more:
                    await self._rest(awake, pause)

    async def _take(self, name: str, step: Callable[[], Awaitable[bool]]) -> bool:
        self._begun[name] = time.monotonic()
        try:
            return await step()
        finally:
            del self._begun[name]

    async def _beat(self) -> None:
        """Touch the heartbeat while no part is stuck in a step. One that rests, or fails and tries again, is not."""
        if (file := self._settings.heartbeat) is None:
            return
        while not self._stopping.is_set():
            now = time.monotonic()
            if now - min(self._begun.values(), default=now) < STUCK_SECONDS:
                await anyio.Path(file).touch()
            await self._rest(None, BEAT_SECONDS)

    async def _rest(self, awake: asyncio.Event | None, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for((awake or self._stopping).wait(), seconds)

    async def _send(self, sessions: Sessions) -> bool:
        async with sessions.begin() as session:
            sent, failure = await outbox.send_waiting(session, self._publish)
        relay_metrics.MESSAGES.inc(sent)
        if failure is not None:
            raise failure
        return sent == outbox.BATCH

    async def _publish(self, announcement: Announcement) -> None:
        """The message's headers carry on the request's id and its trace; what is to be done is the job's id alone."""
        job_id = str(announcement.job_id)
        attributes = {"messaging.system": "celery", "blueprints.job_id": job_id}
        with span("announce job", "producer", parent=announcement.trace_parent, attributes=attributes):
            headers = {"request_id": announcement.request_id, "traceparent": current_traceparent()}
            send = partial(
                self._celery.send_task, announcement.task, [job_id], queue=PROFILE_QUEUE, retry=False, headers=headers
            )
            await asyncio.get_running_loop().run_in_executor(self._thread, send)
        fields = {"job_id": job_id, "request_id": announcement.request_id}
        logger.info("relay: announced a job", extra={"fields": fields})

    async def _sweep(self, sessions: Sessions) -> bool:
        async with sessions.begin() as session:
            lost = await job_parts.end_lost_attempts(session)
        async with sessions.begin() as session:
            again = await job_parts.announce_again(session, reannounce_seconds=self._settings.reannounce_seconds)
        async with sessions.begin() as session:
            answers = await idempotency.forget_old(session)
        async with sessions.begin() as session:
            given_up = await webhook_deliveries.give_up_ended(session)
            messages = await webhook_deliveries.forget_old(session)
        relay_metrics.LEASE_LOSSES.inc(lost)
        relay_metrics.ANNOUNCED_AGAIN.inc(again)
        if lost or again:
            logger.info("sweeper: ended %d lost attempts, announced %d parts again", lost, again)
        return (
            max(lost, again) == job_parts.SWEEP_BATCH
            or answers == idempotency.FORGET_BATCH
            or max(given_up, messages) == webhook_deliveries.FORGET_BATCH
        )
