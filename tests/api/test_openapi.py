"""The served OpenAPI document says what is so. That answers keep to it is tests/api/test_schemathesis.py's to show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from app.settings import Settings
from tests.api.test_authorization import OPEN, READ
from tests.conftest import serving

DIGEST = "sha256:" + "0" * 64


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


@pytest.fixture
def document(http: httpx2.Client) -> dict[str, Any]:
    described: dict[str, Any] = http.get("/v1/openapi.json").json()
    return described


def test_a_key_is_optional_for_reading_and_for_nothing_else(document: dict[str, Any]) -> None:
    optional = {name for name, operation in operations(document) if {} in operation.get("security", ())}
    assert optional == READ & {name for name, _ in operations(document)}
    assert {name for name, operation in operations(document) if "security" not in operation} <= OPEN


def test_where_reads_are_closed_no_key_is_optional(settings: Settings) -> None:
    closed = settings.model_copy(update={"public_reads": False})
    with serving(closed) as server, httpx2.Client(base_url=server.url) as http:
        document = http.get("/v1/openapi.json").json()
    assert not any({} in operation.get("security", ()) for _, operation in operations(document))


def test_no_parameter_is_ever_null_and_every_address_with_a_variable_may_lead_nowhere(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), (name, parameter)
        assert "{" not in name or "404" in operation["responses"], name


@pytest.mark.parametrize(
    ("path", "methods"),
    [(f"/v1/blobs/{DIGEST}", "GET, HEAD, PUT"), ("/v1/keys", "GET, HEAD, POST"), ("/livez", "GET, HEAD")],
)
def test_a_method_that_is_not_possible_is_answered_with_all_that_are(
    http: httpx2.Client, path: str, methods: str
) -> None:
    answer = http.request("PATCH", path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, methods)
