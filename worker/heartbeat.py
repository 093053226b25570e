"""A file that is touched while the worker hears the broker, so that a health check sees one that no longer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery, bootsteps

BEAT_SECONDS = 2.0


def keep_heartbeat(celery: Celery, file: Path) -> None:
    """Touch `file` as long as the main loop turns and the connection to the broker stands."""

    class Heartbeat(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
        # Started when consuming has begun, and stopped and started again with every loss of the connection.
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, consumer: Any, **options: Any) -> None:
            self._timer: Any = None

        def start(self, consumer: Any) -> None:
            file.touch()
            self._timer = consumer.timer.call_repeatedly(BEAT_SECONDS, file.touch)

        def stop(self, consumer: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    celery.steps["consumer"].add(Heartbeat)
