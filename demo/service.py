"""The registry with its worker, started for the demo as an operator would, and stopped again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
READY_SECONDS = 120.0
STOP_SECONDS = 60.0


class ServiceFailed(Exception):
    """The service did not start; the message ends with what it said."""


@dataclass(frozen=True)
class Service:
    url: str
    admin_key: str
    here: bool = True
    """Whether its workers read our files; else they are uploaded."""


@contextmanager
def running(work: Path, threads: int) -> Iterator[Service]:
    """`python -m app up` on a free port, with a fresh data directory that is removed afterwards.

    Jobs may read from `work`. The worker computes with `threads` threads: what trains beside it needs the rest, and
    two that each want every core slow each other down tenfold.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
    environment = own | {
        "BLUEPRINTS_ALLOWED_ROOTS": str(work),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
    with tempfile.TemporaryDirectory(prefix="service-", dir=work, ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "up", "--data-dir", folder, "--port", "0"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: jobs are cancelled and things closed before the service goes
        )
        try:
            url = _wait_for_url(process)
            yield Service(url, (Path(folder) / "admin.key").read_text().strip())
        finally:
            _stop(process)


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said: list[str] = []
    reader = threading.Thread(target=_read, args=(process.stdout, said), daemon=True)
    reader.start()
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        served = re.search(r"serves (http://[^\s,]+)", "".join(said))
        if served:
            return served.group(1)
        time.sleep(0.05)
    reader.join(timeout=1)
    raise ServiceFailed("`python -m app up` did not start:\n" + "".join(said[-20:]))


def _read(output: IO[str], said: list[str]) -> None:
    """Also keeps the pipe from filling up while the service runs."""
    for line in output:
        said.append(line)  # noqa: PERF402 - line by line, as others read the list meanwhile


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its guard ends what it leaves behind
        process.wait()
