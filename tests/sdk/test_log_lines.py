"""Lines of the log: one a record whatever is in it, with ids, without secrets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context

import pytest

from gradient_blueprints.log_lines import (
    JsonLines,
    TextLines,
    add_ids,
    hide_secrets,
    log_again,
    passwords_in,
)

KEY = "gbr_" + "Ab3-_" * 9 + "_0a1b2c"


def record(message: str = "said %s", *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("app.somewhere", logging.WARNING, __file__, 1, message, arguments, None)
    made.fields = fields
    return made


def run_apart(function: Callable[[], None]) -> None:
    """In a context of its own, so that no id stays."""
    copy_context().run(function)


def test_a_line_of_json_holds_what_was_said_and_what_it_is_about() -> None:
    def log() -> None:
        add_ids(request_id="r-1", job_id=None)
        line = json.loads(JsonLines().format(record("took %d of %s", 3, "ten", status=200, route=None)))
        assert line.pop("time").endswith("Z")
        assert line == {
            "level": "WARNING",
            "logger": "app.somewhere",
            "message": "took 3 of ten",
            "request_id": "r-1",
            "status": 200,
            "route": None,
        }

    run_apart(log)


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_nobody_can_write_a_second_line(formatter: logging.Formatter) -> None:
    hostile = "a\nINFO forged\r\x1b[2J\u2028\x85b"
    line = formatter.format(record("said %s", hostile, path=hostile))
    assert len(line.splitlines()) == 1
    assert line.isprintable()


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_keys_passwords_and_named_secrets_are_never_written(formatter: logging.Formatter) -> None:
    password, quoted = "an-0perator's-s3cret", 'with"quotes\\inside'
    hide_secrets((password, quoted, None, "short"))
    url = f"postgresql://user:not%40named@host/name and redis://:{password}@host"
    try:
        raise ValueError(f"{KEY} {quoted} {url}")
    except ValueError:
        given = record("%s", f"{KEY} {password} {quoted} {url}", path=f"/x?key={KEY}")
        given.exc_info = sys.exc_info()
    line = formatter.format(given)
    for secret in (KEY, KEY[4:20], password, quoted, json.dumps(quoted)[1:-1], "not%40named"):
        assert secret not in line
    assert "gbr_Ab3-_Ab3***" in line  # the visible prefix tells which key it was
    assert "ValueError" in line
    assert "@host" in line


def test_the_passwords_of_urls_are_found() -> None:
    urls = ("postgresql://u:p%20w@h/d", "redis://:secret@h:1/0", "redis://h:1/0", None)
    assert passwords_in(*urls) == ["p%20w", "secret"]


def test_a_thread_that_is_given_the_context_writes_its_ids(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []

    def log() -> None:
        add_ids(job_id="j-1")
        write = lambda: lines.append(TextLines().format(record("here")))  # noqa: E731
        thread = threading.Thread(target=copy_context().run, args=(write,))
        thread.start()
        thread.join()

    run_apart(log)
    assert lines[0].endswith("app.somewhere: here job_id=j-1")


def test_what_another_process_logged_keeps_its_level_its_logger_and_its_exception(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = (
        "import logging, warnings\n"
        "from gradient_blueprints.log_lines import LogFormat, start_logging\n"
        "start_logging(LogFormat.JSON)\n"
        "warnings.warn('a warning of a library')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.getLogger('worker.profile').exception('it failed')\n"
        "print('printed', file=__import__('sys').stderr)\n"
    )
    written = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    caplog.set_level(logging.INFO)
    answers = [log_again(line, logging.getLogger("worker.child"), {"process": 7}) for line in written.splitlines()]
    warned, failed, printed = caplog.records
    assert (warned.name, warned.levelname) == ("py.warnings", "WARNING")
    assert (failed.name, failed.levelname, failed.getMessage()) == ("worker.profile", "ERROR", "it failed")
    assert json.loads(JsonLines().format(failed))["process"] == 7
    assert "ZeroDivisionError" in json.loads(JsonLines().format(failed))["exception"]
    assert (printed.name, printed.getMessage()) == ("worker.child", "printed")
    assert answers[1].splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"level": "LOUD", "logger": "a", "message": "b", "time": ""}', "3"])
def test_a_line_that_only_looks_like_ours_is_logged_as_it_is(line: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert log_again(line, logging.getLogger("worker.child"), {}) == line
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("worker.child", line)]
