"""The HTTP application: routes, error rendering and the state that requests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
from fastapi import APIRouter, FastAPI
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.api import (
    administration,
    aggregation,
    aliases,
    blobs,
    blueprints,
    catalog,
    files,
    health,
    jobs,
    layer_selection,
    metrics,
    openapi,
    problems,
    runs,
    shard_states,
    staleness,
    webhooks,
)
from app.api.gate import Gate
from app.api.metrics import Metrics
from app.api.patience import Patience
from app.api.rate_limits import RateLimits
from app.api.ready_answers import FastFetches, ReadyAnswers
from app.api.representations import DocumentCache
from app.api.traced import TracedRequests
from app.database import create_engine, create_sessions
from app.registry.blobs import remove_unfinished
from app.registry.current import ALIASED, LIVE_KEYS, NEWEST_OF_OWNER, YANKS, CurrentRows
from app.registry.file_store import open_store
from app.registry.keys import ensure_bootstrap_key
from app.settings import Settings, read_settings
from app.web import account, admin, assets, reference
from app.web import blueprints as blueprint_pages
from app.web import catalog as catalog_pages
from app.web import comparison as comparison_pages
from app.web import consensus as consensus_pages
from app.web import errors as error_pages
from app.web import jobs as job_pages
from app.web import leaderboard as leaderboard_pages
from app.web import runs as run_pages
from gradient_blueprints.models import Scope
from gradient_blueprints.tracing import is_tracing, start_tracing

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    metrics.router,
    blueprints.router,
    aliases.router,
    blobs.router,
    files.router,
    jobs.router,
    shard_states.router,
    aggregation.router,
    staleness.router,
    layer_selection.router,
    runs.router,
    administration.router,
    webhooks.router,
    catalog.router,  # last of the API: `/v1/models/{model_id}` matches whatever the others did not
    assets.router,
    blueprint_pages.router,
    comparison_pages.router,
    consensus_pages.router,
    catalog_pages.router,
    account.router,
    admin.router,
    job_pages.router,
    leaderboard_pages.router,
    run_pages.router,
    reference.router,
)
CURRENT = (NEWEST_OF_OWNER, ALIASED, YANKS, LIVE_KEYS)
"""The queries that are asked for all requests together, each on a connection of its own."""


def application() -> FastAPI:
    """The entry point of uvicorn's --factory: settings from the environment."""
    start_tracing("gradient-blueprints-api", os.environ)
    return create_app(read_settings())


class RegistryApp(FastAPI):
    """FastAPI behind a front, which answers or describes a request before FastAPI's own layers have cost their time."""

    front: ASGIApp

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)


def _front(app: ASGIApp, state: State) -> ASGIApp:
    settings: Settings = state.settings
    if settings.public_reads:
        app = FastFetches(app, settings, state.ready_answers, state.documents, state.metrics, state.rate_limits)
    if settings.trusted_proxies:
        app = ProxyHeadersMiddleware(app, trusted_hosts=settings.trusted_proxies)  # type: ignore[arg-type, assignment]
    return TracedRequests(app) if is_tracing() else app


def create_app(settings: Settings) -> FastAPI:
    app = RegistryApp(
        title="Gradient blueprint registry",
        version="1",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # app.web.reference: FastAPI's own page loads scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.keys_marked_used = {}
    app.state.metrics = Metrics()
    app.state.rate_limits = RateLimits(settings)
    app.state.patience = Patience(settings.request_seconds)
    app.state.documents = DocumentCache(settings.document_cache_bytes)
    app.state.ready_answers = ReadyAnswers()
    app.state.file_store = open_store(settings.checkpoint_location)
    app.front = _front(partial(FastAPI.__call__, app), app.state)
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app)
    error_pages.install(app)
    app.add_middleware(
        Gate,
        settings=settings,
        metrics=app.state.metrics,
        limits=app.state.rate_limits,
        patience=app.state.patience,
    )
    openapi.describe(app, ROUTERS, public_reads=settings.public_reads)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    engine = create_engine(settings)
    app.state.engine = engine
    app.state.sessions = create_sessions(engine)
    app.state.autocommit_sessions = create_sessions(engine.execution_options(isolation_level="AUTOCOMMIT"))
    engine_of_streams = aggregation.create_engine_of_streams(settings)
    app.state.streaming_sessions = create_sessions(engine_of_streams)
    engine_of_queries = create_engine(settings, connections=len(CURRENT))  # whoever is late must not hold these up
    patience = min(2.0, settings.request_seconds / 4)  # what is left is for the longer way
    current = [CurrentRows(engine_of_queries, query, patience) for query in CURRENT]
    app.state.newest_of_owner, app.state.aliased, app.state.yanks, app.state.live_keys = current
    running = [asyncio.create_task(work()) for work in (app.state.patience.watch, *(rows.run for rows in current))]
    try:
        await anyio.to_thread.run_sync(remove_unfinished, settings.store)
        async with app.state.sessions() as session:
            for key, scope in ((settings.admin_key, Scope.ADMIN), (settings.worker_key, Scope.WORK)):
                if key is not None:
                    await ensure_bootstrap_key(
                        session, key.get_secret_value(), settings.secret, scope, lab_name=settings.operator_lab
                    )
            await session.commit()
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)  # they give their connections back
        for one in (engine_of_queries, engine_of_streams, engine):
            await one.dispose()
