"""Find, end and name the processes that serve a data directory, whoever started them."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

# Every process of a supervisor carries its data directory in this variable. A process found by its own environment
# cannot be mistaken for another that got its number later, which a file of process numbers alone cannot promise.
MARK = "BLUEPRINTS_SUPERVISED_IN"

# Both servers overwrite their environment with their title, so they are known by the folder that they work in: the one
# that they are started in, or the one with their data within it.
SERVERS = {"postgres", "valkey-server"}
DATA = {"data", "data.unfinished"}


class CannotStart(Exception):
    """Something that the service needs does not start; the message says what to do."""


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes that serve `folder`, a data directory or a server's own: marked with it, or a server at work there.

    Never ourselves, and never what serves another data directory, even one that lies inside this one.
    """
    folder = folder.resolve()
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in ourselves:
            continue
        # A process that ends while we look, or that belongs to someone else, is not ours to end.
        with contextlib.suppress(psutil.Error, OSError):
            if _serves(process, folder):
                found.append(process)
    return found


def _serves(process: psutil.Process, folder: Path) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    if process.name() in SERVERS:
        place = Path(process.cwd())
        home = place.parent if place.name in DATA else place
        return folder in (home, home.parent)
    return bool(process.environ().get(MARK) == str(folder))


def end(processes: Iterable[psutil.Process], *, grace: float = 10.0) -> None:
    """Ask the processes to stop, wait at most `grace` seconds, kill what is left of them and of their children."""
    processes = list(processes)
    family = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            family.update(process.children(recursive=True))
    for process in processes:
        with contextlib.suppress(psutil.Error):
            _ask_to_stop(process)
    psutil.wait_procs(processes, timeout=grace)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def _ask_to_stop(process: psutil.Process) -> None:
    if process.name() != "postgres":
        process.terminate()
        return
    parent = process.parent()
    if parent is None or parent.name() != "postgres":
        # SIGINT is Postgres' fast shutdown, SIGTERM waits for clients; its own children it stops itself.
        process.send_signal(signal.SIGINT)


def end_left_behind(folder: Path, *, grace: float = 10.0) -> int:
    """End everything that still serves `folder`; answers how many processes that were."""
    ended = 0
    # A second look catches what was started while the first was ending things.
    for _ in range(2):
        processes = left_behind(folder)
        if not processes:
            break
        ended += len(processes)
        end(processes, grace=grace)
    return ended


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now; somebody may have it a moment later, so callers try again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, for an error message."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    return f"({log} cannot be read)"
