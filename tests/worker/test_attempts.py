"""One attempt, made in this process against a real registry: what the registry hears when the worker itself fails."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gradient_blueprints import Client, Scope
from gradient_blueprints.models import Job, JobState
from tests.conftest import Server
from worker import attempts
from worker.attempts import recover, work_on
from worker.settings import WorkerSettings

Submit = Callable[..., Job]
PAUSE = 0.5


@pytest.fixture
def attempt(server: Server, lab: Client, roots: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], Job]:
    """Has a worker work on the job, and tells what became of it."""
    settings = WorkerSettings(
        url=server.url,
        api_key=server.key("workers", Scope.WORK),
        broker_url="redis://127.0.0.1:9",
        allowed_roots=(roots,),
    )
    monkeypatch.setattr(attempts, "CRASH_PAUSE", PAUSE)

    def work(job: Job) -> Job:
        work_on(job.id, settings, threading.Event())
        return lab.get_job(job.id)

    return work


def no_room(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "file" / "scratch"))


def no_process(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


@pytest.mark.parametrize(("fail", "error"), [(no_room, "NotADirectoryError"), (no_process, "FileNotFoundError")])
def test_a_worker_that_fails_tells_so_and_pauses(
    fail: Callable[..., None],
    error: str,
    attempt: Callable[[Job], Job],
    submit: Submit,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    job = submit()
    fail(monkeypatch, tmp_path)
    began = time.monotonic()
    told = attempt(job)
    assert (told.state, told.attempts) == (JobState.QUEUED, 1)
    assert (told.reason or "").startswith(f"attempt 1 of 3: the worker failed: {error}: ")
    assert time.monotonic() - began > PAUSE


def test_a_worker_without_its_device_takes_no_job_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "CRASH_PAUSE", 0.0)
    stopping = threading.Event()
    lost = WorkerSettings(url="http://127.0.0.1:9", api_key="none", broker_url="redis://127.0.0.1:9", device="cuda:99")
    recovering = threading.Thread(target=recover, args=(lost, stopping))
    recovering.start()
    recovering.join(20)
    assert recovering.is_alive()
    stopping.set()
    recovering.join(20)
    assert not recovering.is_alive()
    recover(lost.model_copy(update={"device": "cpu"}), threading.Event())


def test_a_reason_that_holds_what_is_no_text_is_told(
    attempt: Callable[[Job], Job], submit: Submit, roots: Path
) -> None:
    text = roots / "hostile.jsonl"
    text.write_text(json.dumps({"\ud800": 1, "nul\0": 2}) + "\n")
    told = attempt(submit(data={"general": text}))
    assert told.state is JobState.FAILED
    assert r"it has nul, \ud800: name the right one" in (told.reason or "")
