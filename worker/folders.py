"""Folders for the temporary files of running jobs.

A worker holds a lock on each while its job runs, and a lock ends with its process, however that ended: so what a killed
worker left behind is told from what is in use, also by workers in other containers that share the volume.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "blueprint-job-"


@contextmanager
def job_folder() -> Iterator[Path]:
    """A new folder, removed at the end. It gets its name when it is locked, so that none with this name is without."""
    Path(tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)  # an operator's clean-up may have taken it
    new = Path(tempfile.mkdtemp(prefix=".new-"))
    with _opened(new) as handle:
        with suppress(OSError):  # a file system without locks: nothing is removed there by others
            fcntl.flock(handle, fcntl.LOCK_EX)
        folder = new.rename(new.with_name(new.name.replace(".new-", PREFIX)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove what killed workers left where this one works."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), _opened(folder) as handle:  # in use, somebody else's, or removed meanwhile
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("%s was left behind and is removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)
