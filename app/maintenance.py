"""The commands that look after what the registry holds: `python -m app backup`, `restore` and `verify`."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from app.backup import BackupFailed, back_up, newest_dump, restore, restore_secrets
from app.database import create_engine, create_sessions
from app.registry.file_store import open_store
from app.registry.verification import verify
from app.settings import Settings, read_settings

SECRETS = ("secret", "admin.key", "worker.key")  # of a data directory


def run(arguments: Namespace) -> int:
    """The exit status: 0, or 1 when a backup or its restoration failed or something is not as it was."""
    try:
        if arguments.command == "restore" and arguments.data_dir is not None:
            arguments.dump = arguments.dump or newest_dump(arguments.folder)
            restore_secrets(arguments.folder, arguments.data_dir)
        with _settings(arguments.data_dir, new=arguments.command == "restore") as settings:
            match arguments.command:
                case "backup":
                    kept = [arguments.data_dir / name for name in SECRETS] if arguments.data_dir is not None else []
                    secrets = [path for path in kept if path.exists()]
                    dump = back_up(
                        settings, arguments.folder, keep=arguments.keep, dump=arguments.dump, secrets=secrets
                    )
                    print(f"backed up to {dump}")
                    return 0
                case "restore":
                    restore(settings, arguments.folder, arguments.dump)
            return 1 if asyncio.run(_verify(settings)) else 0
    except BackupFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def _settings(data_dir: Path | None, *, new: bool) -> Iterator[Settings]:
    """Those of the environment, completed by what `up` keeps in its data directory; a database is made in a new one."""
    with ExitStack() as stack:
        if data_dir is not None:
            from app.embedded import data_directory  # psutil, which the server's image does without
            from app.embedded.attached import attached
            from app.embedded.processes import CannotStart

            if not new:
                _require_data(data_dir)
            if not os.environ.get("BLUEPRINTS_SECRET"):
                os.environ["BLUEPRINTS_SECRET"] = _read_secret(data_dir / "secret")
            try:
                data_dir = data_directory.make(data_dir)
                if not os.environ.get("BLUEPRINTS_DATABASE_URL"):
                    os.environ["BLUEPRINTS_DATABASE_URL"] = stack.enter_context(attached(data_dir))
            except CannotStart as error:
                raise BackupFailed(str(error)) from error
            if not os.environ.get("BLUEPRINTS_STORE"):
                os.environ["BLUEPRINTS_STORE"] = str(data_dir / "store")
        yield read_settings()


def _require_data(data_dir: Path) -> None:
    """A directory that is mistyped or not mounted is refused, not made."""
    if not data_dir.is_dir():
        raise BackupFailed(f"there is no directory {data_dir}")
    if not os.environ.get("BLUEPRINTS_DATABASE_URL") and not (data_dir / "postgres" / "data").is_dir():
        raise BackupFailed(
            f"{data_dir} holds no database: there is no postgres/data in it, and BLUEPRINTS_DATABASE_URL is not set"
        )


def _read_secret(file: Path) -> str:
    """Never made here: with another than its own no key of a registry is valid."""
    try:
        return file.read_text().strip()
    except OSError as error:
        raise BackupFailed(f"{file} cannot be read ({error.strerror}), and BLUEPRINTS_SECRET is not set") from error


async def _verify(settings: Settings) -> int:
    """Print what was looked at and each fault; how many there are."""
    engine = create_engine(settings)
    faults = 0
    try:
        store = open_store(settings.checkpoint_location)
        async for checked in verify(create_sessions(engine), settings.store, store):
            for fault in checked.faults:
                print(f"FAULT {fault}", flush=True)
            faults += len(checked.faults)
            size = f", {checked.bytes:,} bytes" if checked.bytes else ""
            print(f"{checked.count} {checked.kind}{size}: {len(checked.faults)} faults", flush=True)
    finally:
        await engine.dispose()
    return faults
