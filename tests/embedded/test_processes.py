"""Which processes belong to a data directory, and ending them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.embedded import valkey
from app.embedded.processes import MARK, end_left_behind, left_behind

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def sleeper(mark: Path, program: str = "print(flush=True); import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {MARK: str(mark)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_processes_are_known_by_the_mark_that_they_were_started_with(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    sleepers += [sleeper(tmp_path), sleeper(tmp_path / "other")]
    assert [process.pid for process in left_behind(tmp_path)] == [sleepers[0].pid]


def test_those_of_another_directory_are_left_alone(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers += [sleeper(tmp_path), sleeper(tmp_path / "other")]
    assert end_left_behind(tmp_path) == 1
    assert sleepers[1].poll() is None


def test_a_directory_within_a_directory_is_another(private_folder: Path) -> None:
    inner = private_folder / "inner"
    inner.mkdir()
    server = valkey.start(inner / "valkey", durable=False)
    try:
        assert left_behind(private_folder) == []
        assert [process.pid for process in left_behind(inner)] == [server.process.pid]
        assert [process.pid for process in left_behind(inner / "valkey")] == [server.process.pid]
    finally:
        valkey.stop(server)


def test_one_that_ignores_the_request_is_killed(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers.append(sleeper(tmp_path, STUBBORN))
    end_left_behind(tmp_path, grace=0.3)
    assert left_behind(tmp_path) == []


def test_grandchildren_are_ended_too(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers.append(
        sleeper(
            tmp_path,
            "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], env={}, start_new_session=True);"
            "print(p.pid, flush=True); time.sleep(60)",
        )
    )
    children = left_behind(tmp_path)[0].children()
    assert len(children) == 1
    end_left_behind(tmp_path)
    assert not children[0].is_running()
