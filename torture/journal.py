"""What a client meant to do and what it heard, as lines of JSON: written before and after each step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO


class Outcome(StrEnum):
    ACKNOWLEDGED = "acknowledged"  # the registry said that it is done
    REFUSED = "refused"  # the registry said that it is not done: a 4xx
    UNKNOWN = "unknown"  # no answer, or one that leaves it open: a 5xx
    BROKEN = "broken"  # an answer or an exception that must never be


@dataclass(frozen=True)
class Operation:
    """One step of one client."""

    client: int
    number: int
    kind: str
    arguments: dict[str, Any]
    outcome: Outcome = Outcome.UNKNOWN
    answer: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def __str__(self) -> str:
        return f"client {self.client}, step {self.number}, {self.kind}"


class Journal:
    """The file of one client. Each line is handed to the system at once, so that it outlives this process."""

    def __init__(self, folder: Path, client: int) -> None:
        self._file: TextIO = (folder / f"client-{client}.jsonl").open("w", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_journals(folder: Path) -> list[Operation]:
    """The steps of all clients, those of each in their order. One that was begun and never ended is unknown."""
    operations: list[Operation] = []
    for path in sorted(folder.glob("client-*.jsonl")):
        operations += _operations(json.loads(line) for line in path.read_text("utf-8").splitlines())
    return operations


def _operations(entries: Iterable[dict[str, Any]]) -> list[Operation]:
    begun: dict[int, dict[str, Any]] = {}
    for entry in entries:
        begun[entry["number"]] = begun.get(entry["number"], {}) | entry
    return [
        Operation(
            client=entry["client"],
            number=entry["number"],
            kind=entry["kind"],
            arguments=entry["arguments"],
            outcome=Outcome(entry.get("outcome", Outcome.UNKNOWN)),
            answer=entry.get("answer") or {},
            error=entry.get("error"),
        )
        for entry in begun.values()
    ]
