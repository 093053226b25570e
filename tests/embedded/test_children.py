"""A child process that its supervisor starts again."""

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from app.embedded.children import Child
from app.embedded.processes import CannotStart


@pytest.mark.parametrize("error", [CannotStart("no port"), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))])
def test_one_that_cannot_be_started_now_is_started_later(error: Exception, tmp_path: Path) -> None:
    def fail() -> subprocess.Popen[bytes]:
        raise error

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"])

    starts: list[Callable[[], subprocess.Popen[bytes]]] = [fail, start]
    dead = subprocess.Popen(["true"])
    dead.wait()
    child = Child("api", tmp_path / "api.log", dead, lambda: starts.pop(0)(), _pause=0)
    try:
        for _ in range(4):  # it is found dead, its start fails, it is found dead, it starts
            child.keep_running()
        assert child.process is not dead
        assert child.process.poll() is None
    finally:
        child.stop()
