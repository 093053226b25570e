"""How long a request may take until its answer begins."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol

LOOK_SECONDS = 0.5


class Waiting(Protocol):
    answer_by: float
    """time.monotonic() until which the answer must have begun."""

    def give_up(self) -> None: ...


class Patience:
    """Looks after all requests that run, since a timer of its own costs each of them 5 microseconds (decision 0013)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waiting: set[Waiting] = set()

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self.seconds / 4))
            now = time.monotonic()
            for waiting in list(self.waiting):
                if waiting.answer_by < now:
                    waiting.answer_by = math.inf
                    waiting.give_up()
