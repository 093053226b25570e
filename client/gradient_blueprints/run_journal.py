"""A run on disk: a line for its beginning, one for each point and one for its end, so that nothing waits in memory.

A process may be killed at any moment. A line counts once its newline is there; what is torn is cut off.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.record_models import NewRun, ReportedPoint, RunEnd
from gradient_blueprints.run_models import Tally

BLOCK = 4096  # bytes that are sought through at once for the end of the last whole line


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


class GrowingJournal:
    """That of a run that began in `path`, whether or not another has begun there since, or does at this moment."""

    def __init__(self, path: Path, run_id: uuid.UUID) -> None:
        self.path = path
        self.run_id = run_id
        self._known: RunJournal | None = None
        self._size = 0  # bytes of the lines that are known

    def read(self) -> RunJournal:
        """What it holds now; each line is read once, however often this is called."""
        for place in (self.path, aside(self.path, self.run_id)):
            lines = self._news(place)
            if lines is not None:
                self._known = _journal(place, lines, self._known)
                self._size += len(lines)
                return self._known
        raise ConfigurationError(f"{self.path} does not hold the run {self.run_id}, nor does a file beside it.")

    def _news(self, place: Path) -> bytes | None:
        """The lines that are not known yet; None where the file is not that of the run."""
        with suppress(FileNotFoundError), place.open("rb") as file:
            first = file.readline()
            if first.endswith(b"\n") and _journal(place, first).run.id == self.run_id:
                file.seek(self._size)
                lines = file.read()
                return lines[: lines.rfind(b"\n") + 1]
        return None


def read_journal(path: Path) -> RunJournal:
    """Raises ConfigurationError for a file that is no journal."""
    return _journal(path, _whole_lines(path))


def _journal(path: Path, lines: bytes, known: RunJournal | None = None) -> RunJournal:
    """What is `known`, and what the lines add to it."""
    run, points, tally, end = (known.run, [*known.points], known.tally, known.end) if known else (None, [], None, None)
    told = None
    try:
        for line in lines.splitlines():
            entry = json.loads(line)
            if "run" in entry:
                run = NewRun.model_validate(entry["run"])
            elif "point" in entry:
                points.append(ReportedPoint.model_validate(entry["point"]))
                told = told if entry["tally"] is None else entry["tally"]
            else:
                end = RunEnd.model_validate(entry["end"])
        tally = tally if told is None else Tally.model_validate(told)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no journal of a run: {error}") from None
    if run is None:
        raise ConfigurationError(f"{path} is no journal of a run: it does not begin with one")
    return RunJournal(path, run, tuple(points), tally, end)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _cut_what_is_torn(file: BinaryIO) -> None:
    """Leaves whole lines, and reads from the end no further than to the last newline."""
    end = size = file.seek(0, os.SEEK_END)
    whole = 0
    while end and not whole:
        start = max(0, end - BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        whole = start + newline + 1 if newline >= 0 else 0
        end = start
    if whole != size:
        file.truncate(whole)


def _add(path: Path, entry: dict[str, object]) -> None:
    """On the disk, not only in the system's memory, before anything is sent: the registry never has more than it."""
    line = json.dumps(entry).encode() + b"\n"
    with path.open("a+b") as file:
        _cut_what_is_torn(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
