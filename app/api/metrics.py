"""What Prometheus reads of an API process: its requests, and the jobs that the database holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from app.api.dependencies import Session, requires
from app.api.problems import documented
from app.registry.callers import Caller
from app.registry.tally import JobTally, tally_jobs
from gradient_blueprints.models import JobState, Scope

router = APIRouter(tags=["health"])

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
Seen = tuple[str, str, int]


class Metrics:
    """One per application. Every label has few values: routes are templates, never paths that a client made up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "blueprints_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "blueprints_http_request_seconds",
            "From the first line of a request to the last byte of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.documents = Counter(
            "blueprints_document_cache_lookups",
            "Bodies asked of the memory of documents, by whether it had them.",
            ("found",),
            registry=self.registry,
        )
        self.documents_found = self.documents.labels("yes")
        self._jobs = Gauge(
            "blueprints_jobs", "Jobs by state, of the whole registry.", ("state",), registry=self.registry
        )
        self.publications = Counter(
            "blueprints_publications",
            "Documents published, by whom, and whether that made a new version or found the same one there.",
            ("source", "created"),
            registry=self.registry,
        )
        self._outbox = Gauge(
            "blueprints_outbox_messages",
            "Messages that the relay has yet to hand to the broker, of the whole registry.",
            registry=self.registry,
        )
        self._outbox_age = Gauge(
            "blueprints_outbox_age_seconds",
            "Age of the oldest of them, 0 when there is none: it grows while no relay or broker runs.",
            registry=self.registry,
        )
        self._queue_age = Gauge(
            "blueprints_job_queue_age_seconds",
            "Age of the job that waits longest, 0 when none waits.",
            registry=self.registry,
        )
        self.rate_limited = Counter(
            "blueprints_rate_limited",
            "Requests refused because their key or address had used up its quota.",
            ("policy",),
            registry=self.registry,
        )
        # `labels()` takes a lock and builds a key at each call; these are the counters themselves.
        self._answered: dict[Seen, tuple[Callable[[], None], Callable[[float], None]]] = {}

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request, by the route that took it."""
        seen = (method, route, status)
        counters = self._answered.get(seen)
        if counters is None:
            method = method if method in _METHODS else "other"
            route = route or "unmatched"
            counters = (
                self._requests.labels(method, route, str(status)).inc,
                self._seconds.labels(method, route).observe,
            )
            if method != "other":
                self._answered[seen] = counters
        counters[0]()
        counters[1](seconds)

    def show_jobs(self, tally: JobTally) -> None:
        for state in JobState:
            self._jobs.labels(state).set(tally.by_state.get(state, 0))
        self._queue_age.set(tally.longest_wait)
        self._outbox.set(tally.unsent)
        self._outbox_age.set(tally.oldest_unsent)


@router.get("/metrics", response_class=Response, responses=documented())
async def metrics(
    request: Request, session: Session, caller: Annotated[Caller, Depends(requires(Scope.READ, Scope.ADMIN))]
) -> Response:
    """Prometheus text format: what this process answered, and the state of all jobs."""
    shown: Metrics = request.app.state.metrics
    shown.show_jobs(await tally_jobs(session))
    return Response(generate_latest(shown.registry), media_type=CONTENT_TYPE_PLAIN_1_0_0)
