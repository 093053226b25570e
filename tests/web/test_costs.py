"""A page asks the database as many questions for a large registry as for a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from sqlalchemy import Engine, event

from gradient_blueprints.models import Publication
from tests.conftest import Server
from tests.documents import blueprint_document


@contextmanager
def counted_queries() -> Iterator[list[str]]:
    """Every statement of this process' engines: the server runs in a thread of it."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_the_number_of_queries_does_not_grow(registry: Server, publish: Callable[..., Publication]) -> None:
    def fill(labs: int, checkpoints: list[float]) -> None:
        for lab in range(labs):
            for checkpoint in checkpoints:
                document = blueprint_document("tiny", checkpoint, layers=3 + 10 * labs, norm=1 + lab)
                publish(f"lab-{lab}", document)

    def cost() -> dict[str, int]:
        counts = {}
        with httpx2.Client(base_url=registry.url) as http:
            for path in (
                "/?q=tiny",
                "/models/tiny",
                "/models/tiny/checkpoints/0.8",
                "/models/tiny/compare?base=0.5@1&other=0.8@1",
                "/models/tiny/checkpoints/0.8/consensus",
            ):
                with counted_queries() as seen:
                    http.get(path).raise_for_status()
                counts[path] = len(seen)
        return counts

    fill(1, [0.5, 0.8])
    small = cost()
    fill(4, [0.3, 0.5, 0.7, 0.8, 0.9])
    for number in range(3):
        publish("lab-0", blueprint_document(f"tiny-{number}"))
    assert cost() == small
    assert max(small.values()) <= 16
