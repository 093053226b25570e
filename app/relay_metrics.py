"""What Prometheus reads of a relay, where an operator wants it: messages sent, leases lost, steps that failed."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, start_http_server

REGISTRY = CollectorRegistry()

MESSAGES = Counter("blueprints_relay_messages", "Messages that the broker took.", registry=REGISTRY)
LEASE_LOSSES = Counter("blueprints_lease_losses", "Attempts ended because their worker fell silent.", registry=REGISTRY)
ANNOUNCED_AGAIN = Counter(
    "blueprints_relay_announced_again", "Parts of jobs whose message seemed to be lost.", registry=REGISTRY
)
FAILURES = Counter(
    "blueprints_relay_failures",
    "Steps that failed, because the database or the broker was away, by the part of the relay.",
    ("part",),
    registry=REGISTRY,
)


def serve_metrics(address: str) -> None:
    """Answer Prometheus at `host:port`, in a thread of its own."""
    host, _, port = address.rpartition(":")
    start_http_server(int(port), host.strip("[]"), REGISTRY)
