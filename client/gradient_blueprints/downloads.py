"""Fetching a file by its digest: through the cache, resumed where it broke off, verified before it is there."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from gradient_blueprints.cache import NotKept, Partial, copy_into_place
from gradient_blueprints.calls import Connected
from gradient_blueprints.errors import ConfigurationError, ConnectionFailed, OfflineMiss, RangeNotSatisfiable
from gradient_blueprints.transport import NoAnswer, Pause, ReadOn, Request, Steps, Work, jitter

logger = logging.getLogger("gradient_blueprints")


class Downloading(Connected):
    def _fetch_file(self, path: str, digest: str, target: Path | None) -> Steps[Path]:
        """What stands at `path` and has that digest: at `target`, or in the cache."""
        if target is not None and target.is_dir():
            raise ConfigurationError(f"{target} is a folder: give the path of the file, such as {target / 'file'}.")
        cached: Path | None = yield Work(lambda: self.cache.locate(digest))
        if cached is None:
            if self.offline:
                raise OfflineMiss(
                    f"{digest} is not in {self.cache}, and this client is offline. "
                    "Fetch it once while connected, or unset BLUEPRINTS_OFFLINE."
                )
            try:
                cached = yield from self._receive(path, digest, target)
            except NotKept:
                cached = yield from self._receive(path, digest, target, keep=False)
        if target is None or target == cached:
            return cached
        source = cached
        yield Work(lambda: copy_into_place(source, target))
        return target

    def _receive(self, path: str, digest: str, target: Path | None, *, keep: bool = True) -> Steps[Path]:
        with self.cache.receive(digest, otherwise=target, keep=keep) as partial:
            yield from self._download(path, partial)
        return partial.place

    def _download(self, path: str, partial: Partial) -> Steps[None]:
        """Fill `partial`; `timeout` bounds the time without progress, not the whole."""
        failures = 0
        deadline = time.monotonic() + self.timeout
        while not partial.complete:
            begun = partial.size
            # WhoAmI: a range counts the bytes as they are, not as they were compressed.
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {})
            try:
                answer = yield from self._exchange(Request("GET", path, {}, headers), stream=True, silence=self.timeout)
                if answer.status != 206:
                    partial.restart()
                while chunk := (yield ReadOn(answer)):
                    partial.write(chunk)
                return
            except RangeNotSatisfiable:
                partial.restart()
                failures += 1
            except NoAnswer as lost:
                failures = failures + 1 if partial.size <= begun else 0
                if partial.size > begun:
                    deadline = time.monotonic() + self.timeout
                elif time.monotonic() > deadline:
                    raise ConnectionFailed(f"No progress with {path} for {self.timeout:g} s: {lost}.") from lost
                logger.debug("%s broke off at byte %d: %s", path, partial.size, lost)
            yield Pause(jitter(failures + 1))
