"""The HTTP contract as a page: every operation and every schema of the OpenAPI document."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from app.web.rendering import render
from app.web.session import Visiting
from gradient_blueprints.errors import PROBLEM_MEDIA_TYPE

router = APIRouter(include_in_schema=False)

_EVERYWHERE = frozenset({"400", "401", "403", "408", "413", "422", "429", "500", "503"})
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "pattern": "matches {}",
    "default": "{} unless given",
}


@dataclass(frozen=True)
class Kind:
    """What a value is, in pieces: texts, and names of schemas to link to."""

    pieces: tuple[tuple[str, bool], ...]
    """Text, and whether it names a schema."""


@dataclass(frozen=True)
class Member:
    """A parameter of an operation, a property of a schema, or one form of a body."""

    name: str
    kind: Kind
    required: bool
    description: str
    where: str = ""


@dataclass(frozen=True)
class Answer:
    status: str
    description: str
    kinds: tuple[Member, ...]


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    description: str
    needs_key: str
    parameters: tuple[Member, ...]
    bodies: tuple[Member, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Schema:
    name: str
    description: str
    kind: Kind
    properties: tuple[Member, ...]


@router.get("/docs")
async def reference_page(request: Request, visitor: Visiting) -> Response:
    document = request.app.openapi()
    return render(request, "reference.html", sections=_sections(document), schemas=_schemas(document))


def _sections(document: Mapping[str, Any]) -> dict[str, list[Operation]]:
    """Operations by tag, in the order of the routes."""
    sections: defaultdict[str, list[Operation]] = defaultdict(list)
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            sections[told["tags"][0]].append(_operation(method, path, told))
    return dict(sections)


def _operation(method: str, path: str, told: Mapping[str, Any]) -> Operation:
    security = told.get("security")
    parameters = [
        Member(
            one["name"], _kind(one["schema"]), one.get("required", False), _words(one, one["schema"]), where=one["in"]
        )
        for one in told.get("parameters", ())
    ]
    return Operation(
        method=method.upper(),
        path=path,
        description=_prose(told.get("description") or told["summary"]),
        needs_key="no key" if not security else "key optional" if {} in security else "key",
        parameters=tuple(parameters),
        bodies=_contents(told.get("requestBody", {})),
        answers=tuple(
            Answer(status, answer["description"], _contents(answer))
            for status, answer in sorted(told["responses"].items())
            if status not in _EVERYWHERE
        ),
    )


def _contents(holder: Mapping[str, Any]) -> tuple[Member, ...]:
    return tuple(
        Member(media_type, _kind(form.get("schema") or form.get("itemSchema") or {}), True, "")
        for media_type, form in holder.get("content", {}).items()
        if media_type != PROBLEM_MEDIA_TYPE  # which the page tells once
    )


def _schemas(document: Mapping[str, Any]) -> list[Schema]:
    schemas = []
    for name, schema in sorted(document["components"]["schemas"].items()):
        required = schema.get("required", ())
        properties = tuple(
            Member(title, _kind(inner), title in required, _words(inner))
            for title, inner in schema.get("properties", {}).items()
        )
        schemas.append(Schema(name, _prose(schema.get("description", "")), _kind(schema), properties))
    return schemas


def _kind(schema: Mapping[str, Any]) -> Kind:
    joined: list[tuple[str, bool]] = []
    for text, is_schema in _pieces(schema):
        if joined and not is_schema and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        else:
            joined.append((text, is_schema))
    return Kind(tuple(joined))


def _pieces(schema: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2], True
    elif "const" in schema:
        yield repr(schema["const"]), False
    elif "enum" in schema:
        yield " | ".join(map(str, schema["enum"])), False
    elif choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        for number, choice in enumerate(choices):
            if number:
                yield " or ", False
            yield from _pieces(choice)
    elif schema.get("type") == "array":
        yield "list", False
        if schema.get("prefixItems") or schema.get("items"):
            yield " of ", False
            yield from _pieces(schema.get("items") or schema["prefixItems"][0])
    elif isinstance(schema.get("additionalProperties"), Mapping):
        yield "object of ", False
        yield from _pieces(schema["additionalProperties"])
    else:
        yield schema.get("format") or schema.get("type") or "any value", False


def _words(*sources: Mapping[str, Any]) -> str:
    """The description, the limits and the default."""
    described = next((source["description"] for source in sources if source.get("description")), "")
    schema = sources[-1]
    limits = [words.format(_plain(schema[name])) for name, words in _LIMITS.items() if schema.get(name) is not None]
    return _prose("; ".join(filter(None, (described, *limits))))


def _prose(text: str) -> str:
    """Docstrings are written for programmers: without the marks of code and the breaks of lines."""
    return " ".join(text.replace("`", "").split())


def _plain(value: object) -> str:
    return (
        f"{value:,.12g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, bool) else str(value)
    )
