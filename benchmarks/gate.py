"""What the gate costs a request, around an application that only answers: microseconds, the best of several rounds.

python -m benchmarks.gate
"""

from __future__ import annotations

import asyncio
import logging
import logging.config
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG

from app.api.gate import Gate
from app.api.metrics import Metrics
from app.api.patience import Patience
from app.api.rate_limits import Limit, RateLimits
from app.settings import Settings
from gradient_blueprints.log_lines import LogFormat, start_logging

REQUESTS, ROUNDS = 20_000, 5


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"etag", b'"x"'), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def away(message: Message) -> None:
    """Where answers go."""


def request() -> Scope:
    headers = [(b"host", b"h"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip"), (b"user-agent", b"wrk")]
    path = {"path": "/v1/blueprints/sha256:0", "query_string": b"", "headers": headers}
    return {"type": "http", "method": "GET", "scheme": "http", "client": ("127.0.0.1", 1), **path}


async def per_call(call: Callable[[], Awaitable[None]]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REQUESTS):
            await call()
        best = min(best, time.perf_counter() - began)
    return best / REQUESTS * 1e6


async def through(app: ASGIApp) -> float:
    return await per_call(lambda: app(request(), nothing, away))


def gate(*, log_requests: bool) -> Gate:
    settings = Settings(
        database_url="postgresql://nowhere/none",
        secret=SecretStr("s" * 32),
        store=Path("nowhere"),
        address_requests_per_minute=10**9,
        log_requests=log_requests,
    )
    return Gate(answer, settings, Metrics(), RateLimits(settings), Patience(60))


async def main() -> None:
    bare = await through(answer)
    print(f"gate, no line            {await through(gate(log_requests=False)) - bare:6.1f}")
    for form in LogFormat:
        start_logging(form)
        print(f"gate, line of {form:10} {await through(gate(log_requests=True)) - bare:6.1f}")

    logging.config.dictConfig(LOGGING_CONFIG | {"disable_existing_loggers": False})
    access = logging.getLogger("uvicorn.access")
    access.handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined] # where our lines go

    async def line() -> None:
        access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", "/v1/blueprints/sha256:0", "1.1", 200)

    print(f"uvicorn's line           {await per_call(line):6.1f}")
    limit = Limit("address", 10**9)

    async def count() -> None:
        limit.charge("127.0.0.1", time.monotonic())

    async def timer() -> None:
        async with asyncio.timeout(60):
            await nothing()

    print(f"a quota, with its header {await per_call(count):6.1f}")
    print(f"asyncio.timeout          {await per_call(timer):6.1f}")


if __name__ == "__main__":
    uvloop.run(main())
