"""The database of a data directory, for a command that works on it whether `up` runs there or not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL

from app.embedded import data_directory, postgres
from app.embedded.processes import CannotStart


@contextlib.contextmanager
def attached(data_dir: Path) -> Iterator[str]:
    """The URL of the database that `up` runs in this directory, or of one that runs there for as long as we do."""
    with contextlib.ExitStack() as stack:
        ours = True
        try:
            stack.enter_context(data_directory.held(data_dir))
        except CannotStart:
            ours = False
        if not ours:
            yield _running(data_dir / "postgres")
            return
        server = postgres.start(data_dir / "postgres", log=data_directory.log_file(data_dir, "postgres"))
        stack.callback(postgres.stop, server)
        yield server.url


def _running(folder: Path) -> str:
    """As the server itself writes down where it listens, in the fourth line of its pid file."""
    try:
        port = int((folder / "data" / "postmaster.pid").read_text().splitlines()[3])
        password = (folder / "password").read_text()
    except (OSError, IndexError, ValueError):
        raise CannotStart(f"the `up` of {folder.parent} is starting or stopping right now; try again") from None
    url = URL.create("postgresql", postgres.NAME, password, "127.0.0.1", port, postgres.NAME)
    return url.render_as_string(hide_password=False)
