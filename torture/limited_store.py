"""A folder for the store that can be full: a small file system of its own where we may mount one."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BLOCK = bytes(1 << 16)


@dataclass(frozen=True)
class LimitedStore:
    path: Path
    mounted: bool  # else it is a plain folder, which has no limit of its own

    @property
    def _ballast(self) -> Path:
        return self.path / "ballast"

    def fill(self) -> bool:
        """Leave no room at all; False where that cannot be done."""
        if not self.mounted:
            return False
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while file.write(BLOCK):
                pass
        return True

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def limited_store(path: Path, mebibytes: int) -> Iterator[LimitedStore]:
    """A new folder at `path`. Mounting takes a privilege that not every user has."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield LimitedStore(path, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
