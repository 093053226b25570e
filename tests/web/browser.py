"""Where a Chromium for the browser tests is. `python -m tests.web.browser` installs one if need be (`make test`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.conftest import NO_BROWSER

_SYSTEM = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_SECONDS = 300
MISSING = (
    f"{NO_BROWSER}: no Chromium was found, so the tests of the pages are left out; "
    "install one (Debian: apt-get install chromium), then run `make test` again"
)


def find() -> str | None:
    """Playwright's own if it starts, else the system's."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    for candidate in (own, *map(shutil.which, _SYSTEM)):
        if candidate and _starts(candidate):
            return candidate
    return None


def _starts(executable: str) -> bool:
    """Playwright's own needs libraries that a machine may lack."""
    if not Path(executable).exists():
        return False
    asked = subprocess.run([executable, "--version"], capture_output=True, timeout=_SECONDS, check=False)
    return asked.returncode == 0


def install() -> str | None:
    """Playwright's own, else Debian's package where this is root and apt is there."""
    attempts = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        attempts += [["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "--no-install-recommends", "chromium"]]
    for command in attempts:
        print("$", *command, flush=True)
        try:
            subprocess.run(
                command,
                timeout=_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            )
        except subprocess.TimeoutExpired:
            print(f"not done within {_SECONDS} seconds", flush=True)
        if found := find():
            return found
    return None


def main() -> None:
    found = find() or install()
    line = "=" * 100
    print(f"browser tests run in {found}" if found else f"{line}\n{MISSING}\n{line}", flush=True)


if __name__ == "__main__":
    main()
