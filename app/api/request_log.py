"""One line a request: what was asked, by whom, what it was answered, how long it took."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Scope

logger = logging.getLogger("app.requests")
_PROBES = ("/livez", "/readyz", "/metrics")
_LONGEST_PATH = 300


def log_request(
    scope: Scope, method: str, route: str, status: int, seconds: float, every: bool, request_id: str
) -> None:
    """Never the query, which may hold what somebody believed to be the place for a key."""
    level = logging.WARNING if status >= 500 else logging.INFO
    if not logger.isEnabledFor(level) or (status < 400 and (not every or route in _PROBES)):
        return
    path = scope["path"][:_LONGEST_PATH]
    client = scope.get("client")
    fields: dict[str, Any] = {
        "request_id": request_id,
        "method": method,
        "path": path,
        "route": route or None,
        "status": status,
        "seconds": round(seconds, 6),
        "address": client[0] if client else None,
    }
    caller = scope.get("state", {}).get("caller")
    if caller is not None:
        fields |= {"lab": caller.lab, "key": caller.key_prefix}
    if job_id := scope.get("path_params", {}).get("job_id"):
        fields["job_id"] = job_id
    # As `logger.log` does, but for finding out the line that calls, which is this one.
    record = logger.makeRecord(logger.name, level, "", 0, "%s %s: %d", (method, path, status), None)
    record.fields = fields
    logger.handle(record)
