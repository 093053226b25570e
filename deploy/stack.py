"""A composed registry in a folder of its own, for the rehearsal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

REPOSITORY = Path(__file__).resolve().parents[1]
READY_SECONDS = 300.0
BEGUN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:6.0f} s] {text}", flush=True)


def check_out(reference: str | None, target: Path) -> None:
    """The tracked files of a commit, or with None of the working tree as it is now."""
    target.mkdir()
    if reference is None:
        files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
        packed = subprocess.run(
            ["tar", "-c", "--null", "--ignore-failed-read", "-T", "-"],
            cwd=REPOSITORY,
            input=files,
            capture_output=True,
            check=True,
        ).stdout
    else:
        packed = subprocess.run(["git", "archive", reference], cwd=REPOSITORY, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=target, input=packed, check=True)


class Stack:
    def __init__(self, folder: Path, compose: Sequence[str], environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.expected: dict[str, int] = {}
        self._compose = list(compose)
        self._environment = os.environ | dict(environment) | {"COMPOSE": " ".join(compose)}

    def run(self, *command: str, check: bool = True) -> int:
        return subprocess.run(command, cwd=self.folder, env=self._environment, check=check).returncode

    def compose(self, *arguments: str, check: bool = True) -> int:
        return self.run(*self._compose, *arguments, check=check)

    def _output(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    def _inspect(self, what: str, container: str) -> str:
        return self._output("docker", "inspect", "--format", what, container)

    def containers(self, service: str) -> list[str]:
        return self._output(*self._compose, "ps", "-q", service).split()

    def kill(self, service: str, *, every: bool = False) -> None:
        """End the first container of a service, or all, as a crash would: from outside, without Docker being asked."""
        killed = self.containers(service)[: None if every else 1]
        restarts = {container: self._inspect("{{.RestartCount}}", container) for container in killed}
        for container in killed:
            os.kill(int(self._inspect("{{.State.Pid}}", container)), signal.SIGKILL)
        deadline = time.monotonic() + READY_SECONDS
        for container in killed:
            while self._inspect("{{.RestartCount}}", container) == restarts[container]:
                assert time.monotonic() < deadline, f"{service} was not started again"
                time.sleep(0.1)

    def wait_until_ready(self) -> tuple[str, str]:
        """Where the registry is, and its admin key."""
        url = f"http://127.0.0.1:{self._environment['BLUEPRINTS_PORT']}"
        deadline = time.monotonic() + READY_SECONDS
        answer = "no answer"
        while time.monotonic() < deadline:
            try:
                response = httpx2.get(f"{url}/readyz", timeout=5, trust_env=False)
                if response.status_code == httpx2.codes.OK:
                    return url, (self.folder / "secrets" / "admin_key").read_text().strip()
                answer = response.text
            except httpx2.TransportError as error:
                answer = str(error)
            time.sleep(0.5)
        raise AssertionError(f"not ready after {READY_SECONDS:.0f} s: {answer}")

    def wait_until_healthy(self, expected: dict[str, int]) -> None:
        """Until each service has so many containers and Docker calls all of them healthy."""
        self.expected = expected
        deadline = time.monotonic() + READY_SECONDS
        while (healthy := self._healthy()) != Counter(expected):
            assert time.monotonic() < deadline, f"healthy are {dict(healthy)}, expected {expected}"
            time.sleep(1)

    def _healthy(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for service in self.expected:
            for container in self.containers(service):
                found[service] += self._inspect("{{.State.Health.Status}}", container) == "healthy"
        return found

    def flip_a_byte(self) -> None:
        """In the first attachment of the store."""
        flip = (
            "from pathlib import Path\n"
            "path = next(path for path in Path('/data/store/blobs').rglob('*') if path.is_file())\n"
            "content = bytearray(path.read_bytes())\n"
            "content[0] ^= 1\n"
            "path.write_bytes(content)\n"
        )
        self.compose("exec", "-T", "api", "python", "-c", flip)
