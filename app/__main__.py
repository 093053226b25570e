"""The command `python -m app`: the service on one machine (`up`), one of its processes, or care of its data."""

import argparse
import os
import socket
import sys
from pathlib import Path

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.log_lines import LogFormat, start_logging
from gradient_blueprints.tracing import start_tracing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    up = commands.add_parser("up", help="run everything: database, broker, API, relay and one worker")
    up.add_argument("--data-dir", type=Path, required=True, help="where all data is kept; made at the first start")
    up.add_argument("--port", type=int, default=8000, help="of the API; 0 takes any free one (default: %(default)s)")
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    up.add_argument("--no-worker", action="store_true", help="run no worker here")

    serve = commands.add_parser("serve", help="the API; settings from the environment")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--fd", type=int, help="serve the listening socket of this inherited descriptor instead")

    commands.add_parser("migrate", help="bring the database's schema up to date")
    commands.add_parser("relay", help="announce jobs to the broker and requeue what lost its worker")

    backup = commands.add_parser("backup", help="add a backup to a folder; the registry may serve meanwhile")
    backup.add_argument("--keep", type=_count, default=30, help="database dumps to keep (default: %(default)s)")
    restore = commands.add_parser("restore", help="fill an empty database and the store from a backup, then verify")
    verify = commands.add_parser("verify", help="hash again everything that is kept, and report")
    for command in (backup, restore, verify):
        command.add_argument("--data-dir", type=Path, help="what `up` keeps there, running or not")
    for command in (backup, restore):
        command.add_argument("folder", type=Path, help="the backup (docs/operating.md)")
        command.add_argument("--dump", type=Path, help="take this file of `pg_dump --format=custom`")

    arguments = parser.parse_args()
    start_logging(LogFormat(os.environ.get("BLUEPRINTS_LOG_FORMAT", LogFormat.TEXT)))
    # Each command loads what it needs and no more, so that a supervisor stays small beside what it watches.
    match arguments.command:
        case "up":
            from app.embedded.supervisor import up as run_up

            return run_up(
                arguments.data_dir,
                host=arguments.host,
                port=arguments.port,
                with_worker=not arguments.no_worker,
                environment=os.environ.copy(),
            )
        case "serve":
            return _serve(arguments.host, arguments.port, arguments.fd)
        case "migrate":
            from app.database import migrate
            from app.settings import read_settings

            migrate(read_settings().database_url)
        case "relay":
            from app.relay import main as run_relay
            from app.settings import read_settings

            start_tracing("gradient-blueprints-relay", os.environ)
            run_relay(read_settings())
        case "backup" | "restore" | "verify":
            from app.maintenance import run as run_maintenance

            return run_maintenance(arguments)
    return 0


def _serve(host: str, port: int, descriptor: int | None) -> int:
    import uvicorn

    from app.api.head_limit import HeadTimeLimit

    server = uvicorn.Server(
        uvicorn.Config(
            "app.api.application:application",
            factory=True,
            host=host,
            port=port,
            http=HeadTimeLimit,
            log_config=None,  # our own, with a line a request of our own
            access_log=False,
            server_header=False,
            proxy_headers=False,  # app.api.application believes the proxies that the settings name
            # An event stream never ends by itself; its client reconnects and resumes.
            timeout_graceful_shutdown=5,
        )
    )
    # Not uvicorn's own `fd`, which takes every socket for a Unix one and so leaves Nagle's delay on.
    server.run(sockets=None if descriptor is None else [socket.socket(fileno=descriptor)])
    return 0 if server.started else 3


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def run() -> int:
    """What cannot be configured is said without a traceback, which would tell the settings."""
    try:
        return main()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
