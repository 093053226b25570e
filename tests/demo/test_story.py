"""The demo's whole story in short, with a tiny GPT, as a person would run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "work"
    yield folder
    assert processes_of(folder) == [], "the demo left processes behind"


def start(work: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", "--short", "--work", str(work), "--report", str(work / "report.html")],
        cwd=REPOSITORY,
        # An operator's settings must not reach the demo, which runs its own service.
        env=os.environ | {"BLUEPRINTS_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Processes that were started for, or with, something in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            said = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any(str(folder) in each for each in said) and process.pid != os.getpid():
            found.append(f"{process.pid} {' '.join(said[:5])}")
    return found


@pytest.mark.timeout(240)
def test_the_story_is_told_to_its_end_with_figures_of_its_own(work: Path) -> None:
    process = start(work)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    for act in ("1  A lab submits", "2  The worker has profiled", "3  A second lab", "4  An adapter", "5  The report"):
        assert act in told
    assert [int(version) for version in re.findall(r"✓ Blueprint mini-gpt at \S+ version (\d+)", told)] == [1, 1, 1]
    assert "created False" in told
    assert "still version 1 by foundation-lab" in told
    assert re.search(r"(fresh|stale|indeterminate): .*layers.*, from \d+ sequences", told), told
    losses = {
        name: float(loss) for name, loss in re.findall(r"^  (\S.*?) +━.*held-out loss (\d\.\d+)$", told, re.MULTILINE)
    }
    before = float(re.search(r"nothing +0 +(\d\.\d+)", told).group(1))  # type: ignore[union-attr]  # fails if absent
    assert {
        "everything",
        "published factors, 10 %",
        "local gradient, 10 %",
        "random coordinates, 10 %",
    } <= losses.keys()
    assert all(loss < before for loss in losses.values()), "training did not lower the held-out loss"
    page = (work / "report.html").read_text()
    assert str(work / "report.html") in told
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href)=["']https?:""", page), "the page must not need a network"
    for loss in losses.values():
        assert f"{loss:.3f}" in page
    assert not list(work.glob("service-*"))


@pytest.mark.timeout(120)
def test_an_interrupted_story_stops_what_it_started(work: Path) -> None:
    process = start(work)
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    for line in process.stdout:
        if "labs foundation-lab" in line:  # the service runs
            break
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "interrupted" in told
    assert not list(work.glob("service-*"))
