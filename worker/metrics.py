"""What Prometheus reads of a worker, where an operator wants it: its jobs and the memory that they take."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

REGISTRY = CollectorRegistry()

ATTEMPTS = Counter(
    "blueprints_worker_attempts",
    "Attempts at jobs by how they ended; `lost`: the lease went to another worker.",
    ("outcome",),
    registry=REGISTRY,
)
BUSY = Gauge("blueprints_worker_busy", "1 while this worker has a job, else 0.", registry=REGISTRY)
DEVICE_MEMORY = Gauge(
    "blueprints_worker_device_memory_bytes",
    "Memory that the running job takes: reserved on an accelerator, resident for the device cpu; absent without one.",
    ("device",),
    registry=REGISTRY,
)


def serve_metrics(address: str) -> None:
    """Answer Prometheus at `host:port`, in a thread of its own."""
    host, _, port = address.rpartition(":")
    start_http_server(int(port), host.strip("[]"), REGISTRY)
