"""Folders for servers, and `up` as a process of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from app.embedded.processes import end_left_behind

REPOSITORY = Path(__file__).resolve().parents[2]
SERVING = "Ctrl-C stops everything."


@pytest.fixture
def private_folder() -> Iterator[Path]:
    """A folder of mode 0700, as mkdtemp makes it. Not tmp_path, whose parents every pytest that starts closes again."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    yield folder
    for place in (folder, *folder.iterdir()):
        end_left_behind(place, grace=5)
    shutil.rmtree(folder)


class Up:
    """One run of `python -m app up`."""

    def __init__(self, data_dir: Path, *options: str, command: tuple[str, ...] = (), **settings: str) -> None:
        self.data_dir = data_dir
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        self._output = tempfile.NamedTemporaryFile(prefix="up-", suffix=".txt")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [*(command or (sys.executable,)), "-m", "app", "up", "--data-dir", str(data_dir), "--port", "0", *options],
            cwd=REPOSITORY,
            env=inherited | settings,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text()

    @property
    def url(self) -> str:
        return self.output.partition("The registry serves ")[2].partition(",")[0]

    @property
    def admin_key(self) -> str:
        return (self.data_dir / "admin.key").read_text().strip()

    def wait_until_serving(self) -> "Up":
        deadline = time.monotonic() + 90
        while SERVING not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)
        return self

    def family(self) -> list[psutil.Process]:
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def get(self, path: str, key: str | None = None) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key or self.admin_key}"}
        return httpx2.get(self.url + path, headers=headers, timeout=10, trust_env=False)

    def post(self, path: str, body: dict[str, object]) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        return httpx2.post(self.url + path, headers=headers, json=body, timeout=10, trust_env=False)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
            self.process.wait()
        self._output.close()


@pytest.fixture
def run_up() -> Iterator[Callable[..., Up]]:
    """Starts `up`s, of which none outlives the test."""
    started: list[Up] = []

    def run(data_dir: Path, *options: str, command: tuple[str, ...] = (), **settings: str) -> Up:
        started.append(Up(data_dir, *options, command=command, **settings))
        return started[-1]

    yield run
    for one in reversed(started):
        one.close()
