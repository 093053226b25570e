"""What `up` keeps in its data directory besides the servers' data: the lock, the secrets and the logs."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from app.embedded.processes import CannotStart

LARGEST_LOG = 16 << 20


def make(path: Path) -> Path:
    """The data directory, made where it is missing, as an absolute path without links."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # As root the directory itself must be traversable for Postgres' account: what it holds guards itself.
        for name in ("logs", "store", "sources"):
            (path / name).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise CannotStart(f"{path} cannot be used as data directory: {error.strerror}") from error
    return path.resolve()


@contextlib.contextmanager
def held(data_dir: Path) -> Iterator[Callable[[str], None]]:
    """Hold the directory for this process alone; the yielded function writes our URL for whoever comes second.

    The lock is the kernel's and goes with this process, however that ends; the file says who, and may be out of date.
    """
    with (data_dir / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(f"{data_dir} is in use by {_holder(data_dir / 'lock')}") from None
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"

        def announce(url: str) -> None:
            lock.truncate(0)
            json.dump({"pid": os.getpid(), "url": url, "since": since}, lock)
            lock.flush()

        announce("(not yet known)")
        try:
            yield announce
        finally:
            lock.truncate(0)


def _holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text())
        pid, url, since = holder["pid"], holder["url"], holder["since"]
    except (ValueError, KeyError, TypeError):
        return "another `up` that starts or stops right now; try again"
    return f"process {pid}, which serves {url} since {since}: stop it (kill {pid}) or choose another data directory"


def read_or_make_secret(file: Path, generate: Callable[[], str]) -> tuple[str, bool]:
    """The secret in `file` and whether it was made just now; the file is for its owner alone."""
    with contextlib.suppress(FileNotFoundError):
        if secret := file.read_text().strip():
            return secret, False
    secret = generate()
    write_secret(file, secret)
    return secret, True


def write_secret(file: Path, secret: str) -> None:
    """Write under another name and rename: nobody ever sees half a secret, or one that others can read."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(secret + "\n")
    unfinished.rename(file)


def hashing_secret(data_dir: Path) -> str:
    """Keys the hash of API keys: without this file no key in the database is worth anything any more."""
    return read_or_make_secret(data_dir / "secret", lambda: secrets.token_urlsafe(48))[0]


def log_file(data_dir: Path, name: str) -> Path:
    """The log of one process; a long one of earlier runs is set aside as `NAME.log.1`."""
    file = data_dir / "logs" / f"{name}.log"
    with contextlib.suppress(FileNotFoundError):
        if file.stat().st_size > LARGEST_LOG:
            file.rename(file.with_name(f"{name}.log.1"))
    return file
