"""The relay's heartbeat, by which a health check knows whether it is stuck."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from app import relay
from app.relay import Relay
from app.settings import Settings

STUCK = 1.0


@pytest.fixture
def heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(relay, "STUCK_SECONDS", STUCK)
    monkeypatch.setattr(relay, "BEAT_SECONDS", 0.05)
    return tmp_path / "heartbeat"


def beats(heartbeat: Path, seconds: float) -> bool:
    """Whether the file comes back within that time when it is removed."""
    heartbeat.unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    while not heartbeat.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return heartbeat.exists()


def test_a_part_that_rests_for_long_is_not_stuck(settings: Settings, valkey_url: str, heartbeat: Path) -> None:
    async def run() -> None:
        one = Relay(settings.model_copy(update={"heartbeat": heartbeat, "sweep_seconds": 300.0}), valkey_url)
        running = asyncio.create_task(one.run())
        assert await asyncio.to_thread(beats, heartbeat, 30)
        await asyncio.sleep(3 * STUCK)
        assert await asyncio.to_thread(beats, heartbeat, 2)
        one._stop()
        await running

    asyncio.run(run())


def test_a_part_that_stays_in_a_step_is_stuck(settings: Settings, valkey_url: str, heartbeat: Path) -> None:
    async def run() -> None:
        one = Relay(settings.model_copy(update={"heartbeat": heartbeat}), valkey_url)
        released = asyncio.Event()

        async def hang() -> bool:
            return await released.wait()

        running = asyncio.gather(one._repeat("relay", hang, None, 1), one._beat())
        assert await asyncio.to_thread(beats, heartbeat, 5)
        await asyncio.sleep(1.5 * STUCK)
        assert not await asyncio.to_thread(beats, heartbeat, 0.5)
        one._stop()
        released.set()
        await running

    asyncio.run(run())
