"""From the bytes of a request to a valid document with its digest, or an error that points to the place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiter
from pydantic import ValidationError

from app.registry.review import review
from gradient_blueprints.canonical import canonical_bytes, digest_of
from gradient_blueprints.errors import ErrorPlace, InvalidDocument, MalformedRequest
from gradient_blueprints.models import Blueprint, Warning_, escaped_in_pointer

_MOST_PLACES = 100
_MOST_FAULTS = 100_000  # pydantic makes all of them or none: 50 MiB, and 4 s for the million that a body has room for


@dataclass(frozen=True)
class Document:
    """A valid blueprint, the canonical bytes that stand for it, their digest, and what is dubious in it."""

    blueprint: Blueprint
    body: bytes
    digest: str
    warnings: tuple[Warning_, ...]


def parse_json(body: bytes) -> Document:
    """Raises MalformedRequest for what is not JSON, InvalidDocument for JSON that is not a blueprint.

    jiter refuses nesting beyond 200 levels, NaN and Infinity, unpaired surrogates and repeated
    member names, which the canonical form does not allow (RFC 8785 section 3.1).
    """
    try:
        jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise MalformedRequest(f"The body is not JSON that can be read: {error}.") from None
    try:
        blueprint = Blueprint.model_validate_json(body, strict=True)
    except ValidationError as invalid:
        raise InvalidDocument(
            "The document is not a valid blueprint; errors[] names the places.", errors=_places_in(invalid)
        ) from None
    return from_blueprint(blueprint)


def parse_csv(body: bytes) -> Document:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"The table is not UTF-8: byte {error.start} cannot be read.") from None
    return from_blueprint(Blueprint.from_csv(text))


def from_blueprint(blueprint: Blueprint) -> Document:
    plain = blueprint.to_dict()
    try:
        body = canonical_bytes(plain, exact=True)
    except ValueError as error:
        _refuse_unstorable(plain)
        raise InvalidDocument(f"The document has no canonical form: {error}.") from None
    if b"\\u0000" in body:
        _refuse_unstorable(plain)
    return Document(blueprint=blueprint, body=body, digest=digest_of(body), warnings=review(blueprint))


def _places_in(invalid: ValidationError) -> list[ErrorPlace]:
    if (count := invalid.error_count()) > _MOST_FAULTS:
        return [{"pointer": "", "code": "too_many_faults", "detail": f"{count:,} faults, which are too many to name"}]
    return places_of(invalid.errors(include_url=False, include_input=False))


def places_of(faults: Sequence[Mapping[str, Any]], above: tuple[str, ...] = ()) -> list[ErrorPlace]:
    """The first of pydantic's faults, their locations as JSON pointers (RFC 6901) from below `above` on."""
    faults = faults[: 10 * _MOST_PLACES]
    within = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    places: list[ErrorPlace] = []
    for fault in faults:
        location = fault["loc"]
        if fault["type"] == "too_short" and location in within:
            continue  # only because the faulty members do not count
        parts = location[len(above) :] if location[: len(above)] == above else location
        pointer = "".join(f"/{escaped_in_pointer(part)}" for part in parts)
        pointer += str(fault.get("ctx", {}).get("pointer", ""))  # a validator of a whole list names the member
        places.append({"pointer": pointer, "code": fault["type"], "detail": fault["msg"]})
    return places[:_MOST_PLACES]


def _refuse_unstorable(plain: dict[str, Any]) -> None:
    if faults := list(_unstorable(plain, "")):
        raise InvalidDocument("The document holds values that cannot be kept.", errors=faults[:_MOST_PLACES])


def _unstorable(value: Any, pointer: str) -> Iterator[ErrorPlace]:
    """What JSON allows and the store does not: NUL in text, infinities by overflow."""
    match value:
        case dict():
            for name, member in value.items():
                place = f"{pointer}/{escaped_in_pointer(name)}"
                if "\0" in name:
                    yield {"pointer": place, "code": "nul_character", "detail": "a name holds a NUL character"}
                yield from _unstorable(member, place)
        case list():
            for index, member in enumerate(value):
                yield from _unstorable(member, f"{pointer}/{index}")
        case str() if "\0" in value:
            yield {"pointer": pointer, "code": "nul_character", "detail": "the text holds a NUL character"}
        case float() if value - value != 0:
            yield {"pointer": pointer, "code": "finite_number", "detail": "a number beyond float64"}
