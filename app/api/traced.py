"""A span for each request, where traces are wanted; elsewhere this is not a part of the application at all."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradient_blueprints.log_lines import add_ids
from gradient_blueprints.tracing import span

_PROBES = ("/livez", "/readyz", "/metrics")


class TracedRequests:
    """Pure ASGI, outside of everything else. Names follow OpenTelemetry's conventions for HTTP servers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        status = 499

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"]
        state = scope.setdefault("state", {})
        given = {"http.request.method": method, "url.path": scope["path"], "url.scheme": scope["scheme"]}
        parent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
        with span(method, "server", parent=parent, attributes=given) as opened:
            assert opened is not None
            add_ids(trace_id=f"{opened.get_span_context().trace_id:032x}")
            try:
                await self._app(scope, receive, send_noting)
            finally:
                if route := getattr(scope.get("route"), "path", ""):
                    opened.update_name(f"{method} {route}")
                    opened.set_attribute("http.route", route)
                opened.set_attribute("http.response.status_code", status)
                opened.set_attribute("blueprints.request_id", state.get("request_id", ""))
                if status >= 500:
                    opened.set_attribute("error.type", str(status))
