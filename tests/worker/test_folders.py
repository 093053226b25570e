"""The folders of running jobs: nobody removes one that is in use, and none that was left behind stays."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.child import REPOSITORY
from worker.folders import job_folder, remove_abandoned

HOLDER = """
import sys, time
from worker.folders import job_folder
with job_folder() as folder:
    (folder / "weights").write_bytes(b"large")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; not made yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def other(scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """Another worker's process amid a job."""
    scratch.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=REPOSITORY,
        env={"TMPDIR": str(scratch), "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            yield holder
        finally:
            holder.kill()


def test_a_folder_is_removed_by_others_once_its_worker_is_dead_and_not_before(
    other: subprocess.Popen[str], scratch: Path
) -> None:
    assert other.stdout
    folder = Path(other.stdout.readline().strip())
    remove_abandoned()
    assert (folder / "weights").exists()
    other.kill()
    other.wait()
    assert folder.exists()
    remove_abandoned()
    assert list(scratch.iterdir()) == []


def test_nothing_but_folders_of_jobs_is_removed(scratch: Path, tmp_path: Path) -> None:
    (scratch / "another").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (scratch / "blueprint-job-link").symlink_to(tmp_path / "elsewhere")
    remove_abandoned()
    assert (tmp_path / "elsewhere").exists()
    assert len(list(scratch.iterdir())) == 2


def test_a_place_for_temporary_files_that_vanished_is_made_again(scratch: Path) -> None:
    for _ in range(2):
        with job_folder() as folder:
            assert folder.parent == scratch
        assert not folder.exists()
        scratch.rmdir()
