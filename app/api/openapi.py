"""The OpenAPI document: what FastAPI reads off the routes, and what it cannot know of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.api import problems
from app.api.dependencies import check_reader, identify
from gradient_blueprints.models import MODEL_ID_PATTERN, Blueprint, JobEvent

SHARED = (Blueprint, JobEvent, problems.Problem)
"""Named by reference in routes that read or write bytes of their own making."""


def describe(app: FastAPI, routers: Iterable[APIRouter], *, public_reads: bool) -> None:
    """Have `app` serve the completed document."""
    generate = app.openapi
    readable = {operation for router in routers for operation in _readable(router)} if public_reads else set()

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _add_shared_schemas(document["components"]["schemas"])
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    if (path, method) in readable:
                        operation["security"] = [{}, *operation["security"]]
                    for parameter in operation.get("parameters", ()):
                        parameter["schema"] = _without_null(parameter["schema"])
                        if parameter["name"] == "model_id" and parameter["in"] == "path":
                            parameter["schema"]["pattern"] = f"^{MODEL_ID_PATTERN}$"
                    if "{" in path:  # an address that no route has, whatever the route's own reasons for a 404
                        operation["responses"] |= {"404": problems.documented(404)[404]} | operation["responses"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend its OpenAPI


def _readable(router: APIRouter) -> Iterator[tuple[str, str]]:
    """Path and method of each route that needs no key where reading is public."""
    for route in router.routes:
        if isinstance(route, APIRoute) and set(_key_checks(route.dependant)) == {check_reader}:
            for method in route.methods or ():
                yield route.path_format, method.lower()


def _key_checks(dependant: Dependant) -> Iterator[object]:
    """Whatever decides by who the caller is."""
    for part in dependant.dependencies:
        if part.call is identify:
            yield dependant.call
        else:
            yield from _key_checks(part)


def _add_shared_schemas(schemas: dict[str, Any]) -> None:
    for model in SHARED:
        described = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, definition in described.pop("$defs", {}).items():
            schemas.setdefault(name, definition)
        schemas[model.__name__] = described


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter is given or left out; nobody can send the null that Python's `| None` stands for."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if not kinds:
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**kinds[0], **rest} if len(kinds) == 1 else {"anyOf": kinds, **rest}
