"""What the processes of the cache's tests run; apart, so that they start without the service's imports."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

from gradient_blueprints import Client
from gradient_blueprints.cache import Cache
from gradient_blueprints.canonical import digest_of


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "contents").rglob("*") if path.is_file())


def hammer(url: str, folder: str, count: int) -> list[str]:
    with Client(url, cache=folder) as client:
        found = []
        for index in range(count):
            for path in contents(Path(folder))[: index % 3]:  # another process damages what this one reads
                with suppress(FileNotFoundError, PermissionError):  # removed or put there anew since it was listed
                    path.chmod(0o644)
                    path.write_bytes(b"damaged")
            found.append(client.fetch_blueprint("tiny", 0.8).digest)
            found.append(client.fetch_blueprint("tiny", 0.8, version=1).digest)
        return found


def store_for_ever(folder: str) -> None:
    cache = Cache(Path(folder))
    for number in itertools.count():
        content = bytes([number % 256]) * 200_000
        cache.store(digest_of(content), content)
