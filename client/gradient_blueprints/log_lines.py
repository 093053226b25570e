"""Lines of the log of the service's processes, as text or JSON: with the ids that they are about, without secrets."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_SHORTEST_SECRET = 8  # a shorter one would be found in every other line
_KEY = re.compile(r"(gbr_[A-Za-z0-9_-]{8})[A-Za-z0-9_-]{30,}")
_PASSWORD = re.compile(r"(\w://[^\s:/@\"']*:)[^\s/@\"']+@")
_CONTROL = {number: repr(chr(number))[1:-1] for number in (*range(32), 127, 0x85, 0x2028, 0x2029)}

_ids: ContextVar[Mapping[str, str]] = ContextVar("ids_of_log_lines", default={})  # noqa: B039 - a mapping, never changed
_secrets: set[str] = set()
_ENCODER = json.JSONEncoder(default=str)


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def start_logging(form: LogFormat, level: int = logging.INFO) -> None:
    """Write what is logged to stderr. Whatever was set up before is replaced."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form is LogFormat.JSON else TextLines())
    # What no line shows need not be found out for every record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)


def hide_secrets(secrets: Iterable[str | None]) -> None:
    """Write *** for these from now on, wherever they come from: a key that a library names in its error, say."""
    for secret in secrets:
        if secret is not None and len(secret) >= _SHORTEST_SECRET:
            _secrets.update((secret, _ENCODER.encode(secret)[1:-1], unquote(secret)))


def passwords_in(*urls: str | None) -> list[str]:
    """The passwords of URLs, as they stand there."""
    return [found.rpartition(":")[2] for url in urls if url for found in re.findall(r"\w://([^\s/@]*:[^\s/]+)@", url)]


def add_ids(**ids: str | None) -> None:
    """Write these beside every line from now on, within this task or thread."""
    _ids.set({**_ids.get(), **{name: value for name, value in ids.items() if value}})


def log_again(line: str, logger: logging.Logger, fields: Mapping[str, Any]) -> str:
    """Log what another process wrote to its stderr, and answer it as text.

    A line of JSON (JsonLines) keeps its level, its logger, its fields and its exception; whatever else a process or a
    library prints is a message of `logger`.
    """
    try:
        told = json.loads(line)
        level, name = logging.getLevelNamesMapping()[told.pop("level")], told.pop("logger")
        message, exception = str(told.pop("message")), str(told.pop("exception", ""))
        del told["time"]
    except (ValueError, LookupError, TypeError, AttributeError):
        logger.info("%s", line, extra={"fields": fields})
        return line
    again = logging.getLogger(name)
    if again.isEnabledFor(level):
        record = again.makeRecord(name, level, "", 0, "%s", (message,), None)
        record.fields, record.exc_text = {**told, **fields}, exception
        again.handle(record)
    return f"{message}\n{exception}"


class JsonLines(logging.Formatter):
    """An object a line: time, level, logger, message, the ids, the fields that the call gave, and the exception.

    Fields are given as `logger.info("…", extra={"fields": {"status": 200}})`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if trace := _trace(self, record):
            line["exception"] = trace
        return _without_secrets(_ENCODER.encode(line))


class TextLines(logging.Formatter):
    """The same for reading: what a line is about stands at its end. A message stays on its line, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        about = "".join(f" {name}={_escaped(str(value))}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {_escaped(record.getMessage())}{about}"
        trace = _trace(self, record)
        return _without_secrets(f"{line}\n{trace}" if trace else line)


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(4)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    given: Mapping[str, Any] = getattr(record, "fields", {})
    return {**_ids.get(), **given}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = formatter.formatException(record.exc_info)
    return record.exc_text or ""


def _escaped(text: str) -> str:
    return text if text.isprintable() else text.translate(_CONTROL)


def _without_secrets(line: str) -> str:
    for secret in _secrets:
        if secret in line:
            line = line.replace(secret, HIDDEN)
    if "gbr_" in line:
        line = _KEY.sub(rf"\1{HIDDEN}", line)
    if "://" in line:
        line = _PASSWORD.sub(rf"\1{HIDDEN}@", line)
    return line
