"""A run on disk: a line for its beginning, one for each point and one for its end, so that nothing waits in memory.

A process may be killed at any moment. A line counts once its newline is there; what is torn is cut off.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.record_models import NewRun, ReportedPoint, RunEnd
from gradient_blueprints.run_models import Tally


@dataclass(frozen=True)
class RunJournal:
    """What a file holds."""

    path: Path
    run: NewRun
    points: tuple[ReportedPoint, ...]
    tally: Tally | None
    """At the last point, with its spans."""
    end: RunEnd | None


def begin_journal(path: Path, run: NewRun) -> None:
    """Start the file; one that is there is kept as `run-ID.jsonl` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = find_journal(path)
    if earlier is not None:
        path.replace(aside(path, earlier.run.id))
    path.unlink(missing_ok=True)
    _add(path, {"run": run.model_dump(mode="json", exclude_none=True)})


def aside(path: Path, run_id: uuid.UUID) -> Path:
    """Where a run is kept once another has begun in its file."""
    return path.with_name(f"run-{run_id}.jsonl")


def journal_point(path: Path, point: ReportedPoint, tally: Tally | None) -> None:
    told = None if tally is None else tally.model_dump(mode="json", exclude_none=True)
    _add(path, {"point": point.model_dump(mode="json"), "tally": told})


def journal_end(path: Path, end: RunEnd) -> None:
    _add(path, {"end": end.model_dump(mode="json", exclude_none=True)})


def find_journal(path: Path) -> RunJournal | None:
    """What the file holds; None where there is none, or none that got as far as its first line."""
    try:
        lines = _whole_lines(path)
    except FileNotFoundError:
        return None
    return _journal(path, lines) if lines else None


def journal_of(path: Path, run_id: uuid.UUID) -> RunJournal:
    """That of a run that began in `path`, whether or not another has begun there since, or does at this moment."""
    kept = find_journal(path)
    return kept if kept is not None and kept.run.id == run_id else read_journal(aside(path, run_id))


def read_journal(path: Path) -> RunJournal:
    """Raises ConfigurationError for a file that is no journal."""
    return _journal(path, _whole_lines(path))


def _journal(path: Path, lines: bytes) -> RunJournal:
    run, points, tally, end = None, [], None, None
    try:
        for line in lines.splitlines():
            entry = json.loads(line)
            if "run" in entry:
                run = NewRun.model_validate(entry["run"])
            elif "point" in entry:
                points.append(ReportedPoint.model_validate(entry["point"]))
                tally = tally if entry["tally"] is None else Tally.model_validate(entry["tally"])
            else:
                end = RunEnd.model_validate(entry["end"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no journal of a run: {error}") from None
    if run is None:
        raise ConfigurationError(f"{path} is no journal of a run: it does not begin with one")
    return RunJournal(path, run, tuple(points), tally, end)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _add(path: Path, entry: dict[str, object]) -> None:
    """On the disk, not only in the system's memory, before anything is sent: the registry never has more than it."""
    line = json.dumps(entry).encode() + b"\n"
    with path.open("ab") as file:
        if file.tell() and (whole := len(_whole_lines(path))) != file.tell():
            file.truncate(whole)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
