"""Looks up every pinned dependency in the published advisories: `python -m tests.dependency_audit`, of `make lint`.

It fails when an advisory names a pin. Where the advisories cannot be reached it passes, for nobody could work without a
network otherwise, and says in capitals that the audit was not done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
SECONDS = 15  # for one connection


@dataclass(frozen=True)
class Report:
    looked_up: int
    affected: tuple[str, ...]
    """Pin, advisory, and the versions that mend it."""
    left_out: tuple[str, ...]
    """Pins that were not looked up, which pip-audit itself does not take for a failure."""


def read_pins(text: str) -> list[str]:
    pins = (line.partition("#")[0].strip() for line in text.splitlines())
    return [pin for pin in pins if pin]


def audit(pins: Sequence[str]) -> Report | None:
    """None when there was no answer at all."""
    with tempfile.TemporaryDirectory() as name:
        asked, answer = Path(name, "pins.txt"), Path(name, "answer.json")
        asked.write_text("\n".join(pins) + "\n")
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", f"--timeout={SECONDS}", "--format=json"]
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(asked), "--output", str(answer), *options]
        told = subprocess.run(command, check=False, capture_output=True, text=True)
        if not answer.exists():
            print(told.stderr.strip().rpartition("\n")[2], file=sys.stderr)
            return None
        return read_report(json.loads(answer.read_text())["dependencies"])


def read_report(dependencies: Iterable[dict[str, Any]]) -> Report:
    found = list(dependencies)
    return Report(
        looked_up=sum("skip_reason" not in one for one in found),
        affected=tuple(
            f"{one['name']}=={one['version']}: {known['id']}, mended by {', '.join(known['fix_versions']) or 'nothing'}"
            for one in found
            for known in one.get("vulns", ())
        ),
        left_out=tuple(one["name"] for one in found if "skip_reason" in one),
    )


def main() -> int:
    pins = read_pins(CONSTRAINTS.read_text())
    probe = audit(pins[:1])
    if probe is None or not probe.looked_up:
        print(
            f"\n*** THE DEPENDENCY AUDIT WAS NOT DONE: no advisory service answers from here. ***\n"
            f"*** None of {len(pins)} pins was looked up; run `make audit` on a machine that reaches it. ***\n",
            file=sys.stderr,
        )
        return 0
    report = audit(pins)
    if report is None or report.left_out:
        missing = pins if report is None else report.left_out
        print(f"\n*** NOT AUDITED, for want of an answer: {', '.join(missing)} ***\n", file=sys.stderr)
    if report is None:
        return 0
    for line in report.affected:
        print(line, file=sys.stderr)
    print(f"dependency audit: {report.looked_up} of {len(pins)} pins looked up, {len(report.affected)} advisories")
    return 1 if report.affected else 0


if __name__ == "__main__":
    sys.exit(main())
