"""A child process that is to run for as long as its supervisor does."""

import logging
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.embedded.processes import CannotStart

log = logging.getLogger(__name__)

# One that keeps dying is started ever more rarely; one that lived this long is taken to be well again.
FIRST_PAUSE, LONGEST_PAUSE, WELL_AFTER = 0.5, 30.0, 60.0


@dataclass
class Child:
    """`start` starts it again after a death; `patience` is how long it may take to obey `stop_signal`."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]
    start: Callable[[], subprocess.Popen[bytes]]
    stop_signal: signal.Signals = signal.SIGTERM
    patience: float = 10.0
    _started: float = field(default_factory=time.monotonic)
    _pause: float = FIRST_PAUSE
    _restart_at: float | None = None

    def keep_running(self) -> None:
        """Start it again if it has died and its pause is over."""
        status = self.process.poll()
        if status is None:
            return
        now = time.monotonic()
        if self._restart_at is None:
            if now - self._started > WELL_AFTER:
                self._pause = FIRST_PAUSE
            log.error(
                "%s ended with status %d, starts again in %.1f s; see %s", self.name, status, self._pause, self.log
            )
            self._restart_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif now >= self._restart_at:
            self._restart_at = None
            self._started = now
            try:
                self.process = self.start()
            except (CannotStart, OSError) as error:  # the machine may have memory and processes to spare again later
                log.error("%s: %s", self.name, error)

    def stop(self) -> None:
        """Ask it to stop, wait, and kill it when it does not."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop within %.0f s and is killed", self.name, self.patience)
            self.process.kill()
            self.process.wait()
