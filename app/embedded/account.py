"""The account that embedded servers run as: our own, or for root an unprivileged one that already exists."""

import logging
import os
import pwd
import stat
from pathlib import Path
from typing import NamedTuple

from app.embedded.processes import MARK, CannotStart

log = logging.getLogger(__name__)

# Postgres refuses to run as root. Most systems have the second, a machine with its own Postgres the first.
UNPRIVILEGED = ("postgres", "nobody")


class Account(NamedTuple):
    name: str
    uid: int
    gid: int


def account_for(folder: Path) -> Account | None:
    """Whom a server with its data in `folder` runs as; None is ourselves, the answer for everyone but root."""
    if os.geteuid() != 0:
        return None
    if folder.exists() and (owner := folder.stat().st_uid) != 0:
        # Data once written by an account stays with it, be it ours of an earlier start or an ordinary user's.
        try:
            entry = pwd.getpwuid(owner)
        except KeyError:
            raise CannotStart(
                f"{folder} belongs to user {owner}, whom this system does not know: give it to a known one (chown -R)"
            ) from None
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise CannotStart(
        f"root cannot run Postgres and none of the accounts {', '.join(UNPRIVILEGED)} exists: "
        "run as an ordinary user, or name a server in BLUEPRINTS_DATABASE_URL and BLUEPRINTS_BROKER_URL"
    )


def make_folder(folder: Path, account: Account | None) -> None:
    """Create `folder` for the account alone, and let the account reach it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if account is not None:
        give(folder, account)
        let_traverse(folder, account)
    elif (owner := folder.stat().st_uid) != os.geteuid():
        raise CannotStart(f"{folder} belongs to user {owner}: run as that user or as root, or use another folder")


def give(path: Path, account: Account | None) -> None:
    """Make the account the owner of one file or folder."""
    if account is None:
        return
    try:
        os.chown(path, account.uid, account.gid)
    except OSError as error:
        raise CannotStart(
            f"cannot give {path} to the account {account.name} ({error.strerror}): run as an ordinary user, "
            "or name a server in BLUEPRINTS_DATABASE_URL and BLUEPRINTS_BROKER_URL"
        ) from error


def let_traverse(path: Path, account: Account | None) -> None:
    """Let the account pass through the parents of `path`: adds o+x where it lacks, never o+r, and logs each."""
    if account is None:
        return
    for parent in reversed(path.resolve().parents):
        status = parent.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            log.warning(
                "made %s traversable (chmod o+x): %s, whom the embedded servers run as, must pass through it",
                parent,
                account.name,
            )
            _add_mode(parent, stat.S_IXOTH)


def let_read(tree: Path, account: Account | None) -> None:
    """Let the account read and run the programs below `tree`, which an install under a tight umask does not allow."""
    if account is None:
        return
    let_traverse(tree, account)
    changed = False
    for path in (tree, *tree.rglob("*")):
        if path.is_symlink():
            continue
        mode = path.stat().st_mode
        wanted = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if mode & wanted != wanted:
            _add_mode(path, wanted)
            changed = True
    if changed:
        log.warning("made the programs in %s readable (chmod o+rX) for %s, who runs them", tree, account.name)


def _add_mode(path: Path, bits: int) -> None:
    try:
        path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)
    except OSError as error:
        raise CannotStart(f"cannot open {path} to the account that runs the servers: {error.strerror}") from error


def server_environment() -> dict[str, str]:
    """What a server gets of our environment: how to find libraries and our mark, no keys and no settings."""
    passed = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", MARK)
    return {"LC_ALL": "C", "TZ": "UTC"} | {name: os.environ[name] for name in passed if name in os.environ}
