"""The audit of dependencies never looks done when it was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from app.embedded.processes import free_port
from tests.dependency_audit import CONSTRAINTS, read_pins, read_report

ROOT = Path(__file__).parent.parent


def test_without_an_advisory_service_it_says_that_nothing_was_audited() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    told = subprocess.run(
        [sys.executable, "-m", "tests.dependency_audit"],
        cwd=ROOT,
        env=os.environ | {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "NO_PROXY": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "THE DEPENDENCY AUDIT WAS NOT DONE" in told.stderr
    assert "advisories" not in told.stdout


def test_an_advisory_and_a_pin_that_was_not_found_are_told_apart() -> None:
    """The members are those of pip-audit's own JSON."""
    fault = {"id": "PYSEC-2018-28", "fix_versions": ["2.20.0"], "aliases": [], "description": ""}
    report = read_report(
        [
            {"name": "requests", "version": "2.19.0", "vulns": [fault]},
            {"name": "pydantic", "version": "2.12.0", "vulns": []},
            {"name": "private", "skip_reason": "Dependency not found on PyPI and could not be audited: private (1.0)"},
        ]
    )
    assert report.affected == ("requests==2.19.0: PYSEC-2018-28, mended by 2.20.0",)
    assert (report.looked_up, report.left_out) == (2, ("private",))


def test_every_pin_is_looked_up() -> None:
    pins = read_pins(CONSTRAINTS.read_text())
    assert all(pin.count("==") == 1 and " " not in pin for pin in pins)
    assert len(pins) == CONSTRAINTS.read_text().count("==")
