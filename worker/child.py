"""Starting the process that does a job's work, hearing what it says, and ending it."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextvars import copy_context
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import BaseModel

from gradient_blueprints.log_lines import log_again
from gradient_blueprints.models import NewJob

logger = logging.getLogger(__name__)

KEPT_LINES = 20
CREDENTIALS = re.compile(
    r"(AWS|OTEL)_.*|.*_PROXY|(.*_)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)(_.*)?", re.IGNORECASE
)
URL_WITH_USER = re.compile(r"://[^/\s]*@")
REPOSITORY = Path(__file__).parent.parent


class Fetching(BaseModel):
    """Everything that the process needs which fetches sources, or the states of shards; its first line on stdin."""

    job: NewJob
    job_id: str = ""
    states: tuple[str, ...] = ()  # the digest of each shard's state, for a merge of that job, which needs no sources
    lab: str
    folder: Path
    url: str
    api_key: str
    cache: Path
    cache_bytes: int
    allowed_buckets: tuple[str, ...]
    allowed_hub: tuple[str, ...]
    hub_token: str | None
    networks: tuple[str, ...] = ()  # private ones that sources may lie in
    max_model_bytes: int
    max_text_bytes: int


class Fetched(BaseModel):
    """Where each remote source of a job, or the state of each shard, lies on this machine now."""

    paths: dict[str, Path] = {}
    states: tuple[Path, ...] = ()
    weights_revision: str | None = None
    roots: tuple[Path, ...] = ()


class Specification(BaseModel):
    """Everything that the process needs which profiles; its first line on stdin."""

    job: NewJob
    folder: Path
    allowed_roots: tuple[Path, ...]
    device: str
    max_model_bytes: int
    max_text_bytes: int
    fetched: Fetched = Fetched()
    part: int = 0  # which shard of the job

    def where(self, source: str) -> tuple[str, tuple[Path, ...]]:
        """The path of a source on this machine, and the folders that it and its links may lead to."""
        if source in self.fetched.paths:
            return str(self.fetched.paths[source]), self.fetched.roots
        return source, self.allowed_roots


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold none, as far as their names and forms tell."""
    return {
        name: value
        for name, value in environment.items()
        if not CREDENTIALS.fullmatch(name) and not URL_WITH_USER.search(value)
    }


class Child:
    """A fresh interpreter (spawned, never forked: the worker has threads, and a device must not be shared by a fork).

    Its stdin stays open for as long as this process lives: that is how it learns of our death.
    """

    def __init__(self, specification: Specification | Fetching) -> None:
        # none of our settings: keys and addresses are among them, and it gets what it needs on stdin
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        if isinstance(specification, Specification):  # and no way to anybody else's
            environment = without_credentials(environment)
            environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            module = "worker.profile"
        else:
            environment |= {"HF_HUB_DISABLE_XET": "1"}  # it connects outside Python, where worker.guard does not see it
            module = "worker.fetch"
        environment["TMPDIR"] = str(specification.folder)  # what it is killed amid goes with the job
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=specification.folder,
            start_new_session=True,  # a Ctrl-C in the worker's terminal is the worker's to answer
        )
        self.said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=KEPT_LINES)
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._readers = [
            threading.Thread(target=copy_context().run, args=(self._hear, self._process.stdout), daemon=True),
            threading.Thread(target=copy_context().run, args=(self._log, self._process.stderr), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._process.stdin.write(specification.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            logger.warning("the profiling process ended before it read what to do")

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether it ended and everything it said is in `said`."""
        return self._process.poll() is not None and not self._readers[0].is_alive()

    def resident_bytes(self) -> int:
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def stop(self) -> None:
        """End it and wait. It has nothing to save, so it is not asked first."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:
                logger.debug("the profiling process never read its specification")

    def cause_of_death(self) -> str:
        """Why it ended without an answer, for a person."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the profiling process was killed (SIGKILL), most often because the machine ran out of memory"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code} and no result"
        last = next((line for line in reversed(self._errors) if line.strip()), "")
        return f"the profiling process {how}" + (f": {last.strip()[:500]}" if last else "")

    def _hear(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            try:
                ((kind, content),) = json.loads(line).items()
            except ValueError:
                logger.warning("the profiling process said something else: %r", line[:200])  # cut off by its death
            else:
                self.said.put((kind, content))

    def _log(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            text = log_again(line.decode("utf-8", "replace").rstrip(), logger, {"process": self.pid})
            self._errors.extend(text.replace("\0", "").splitlines())
