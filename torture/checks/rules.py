"""A rule that must hold, how often it was looked at, and where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torture.checks.snapshot import Snapshot
from torture.journal import Operation


@dataclass
class Rule:
    name: str
    examined: int = 0
    violations: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> bool:
        self.examined += 1
        if not holds:
            self.violations.append(otherwise)
        return holds


@dataclass(frozen=True)
class Record:
    """All that there is to judge by: the database, the clients' journals in their order, the folder of the store."""

    database: Snapshot
    journal: list[Operation]
    store: Path


Check = Callable[[Rule, Record], None]
