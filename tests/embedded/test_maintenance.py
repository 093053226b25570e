"""Backup, restoration and verification of what `up` keeps in its data directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.documents import PAPER_EXAMPLE
from tests.embedded.conftest import REPOSITORY, Up

FOUND = ["1 versions: 0 faults", "0 attachments: 0 faults", "0 checkpoint files: 0 faults"]


def run_command(*arguments: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
    command = [sys.executable, "-m", "app", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backup_of_a_running_service_becomes_another_data_directory(
    private_folder: Path, run_up: Callable[..., Up]
) -> None:
    up = run_up(private_folder / "data", "--no-worker").wait_until_serving()
    assert up.post("/v1/blueprints", PAPER_EXAMPLE).status_code == 201
    backup, restored = private_folder / "backup", private_folder / "restored"

    assert run_command("backup", backup, "--data-dir", up.data_dir).startswith(f"backed up to {backup}/database/")
    assert up.get("/readyz").status_code == 200
    assert up.interrupt() == 0

    # Without `up` a command runs the database for as long as it needs it.
    assert run_command("restore", backup, "--data-dir", restored).splitlines()[1:] == FOUND
    assert not (restored / "postgres" / "data" / "postmaster.pid").exists()
    for name in ("admin.key", "secret"):
        assert (restored / name).read_text() == (up.data_dir / name).read_text()
        assert (restored / name).stat().st_mode & 0o777 == 0o600
