"""The lock, the secrets and the logs of a data directory."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.embedded import data_directory
from app.embedded.processes import CannotStart


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    data_dir = data_directory.make(tmp_path / "data")
    with data_directory.held(data_dir) as announce:
        announce("http://127.0.0.1:8000")
        with pytest.raises(CannotStart, match=rf"process {os.getpid()}, which serves http://127\.0\.0\.1:8000 since 2"):
            data_directory.held(data_dir).__enter__()
    with data_directory.held(data_dir):
        pass


def test_the_lock_goes_with_its_holder_however_that_ends(tmp_path: Path) -> None:
    data_dir = data_directory.make(tmp_path / "data")
    program = (
        "import sys, time; from pathlib import Path; from app.embedded import data_directory\n"
        "with data_directory.held(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(data_dir)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(CannotStart, match=str(holder.pid)):
            data_directory.held(data_dir).__enter__()
        holder.kill()
        holder.wait()
        with data_directory.held(data_dir):
            pass


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = data_directory.hashing_secret(tmp_path)
    assert len(first) >= 32
    assert data_directory.hashing_secret(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_path_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(CannotStart, match="cannot be used as data directory"):
        data_directory.make(tmp_path / "data")


def test_a_long_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_directory, "LARGEST_LOG", 3)
    data_dir = data_directory.make(tmp_path)
    (data_dir / "logs" / "api.log").write_text("long")
    assert not data_directory.log_file(data_dir, "api").exists()
    assert (data_dir / "logs" / "api.log.1").read_text() == "long"
