"""Work that keeps the processor busy, in a thread where other requests would wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio

Arguments = TypeVarTuple("Arguments")
Answer = TypeVar("Answer")


async def in_thread_unless(brief: bool, work: Callable[[*Arguments], Answer], *arguments: *Arguments) -> Answer:
    """What `work` answers. A thread costs a fraction of a millisecond, and gives way to others but now and then."""
    if brief:
        return work(*arguments)
    return await anyio.to_thread.run_sync(work, *arguments)
