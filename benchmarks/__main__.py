"""Runs every benchmark, one after the other, and prints one table of all ratios: `make bench`.

python -m benchmarks [NAME ...] [--write]

With --write the table goes into docs/performance.md, between its markers. Rows of benchmarks that were not named stay
there, under the line that says when they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.results import HEADER, RESULTS, Ratio

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- written by `make bench` -->\n", "<!-- end -->\n"
ALL = {
    "fetch": [],
    "peer": [],
    "publish": [],
    "aggregate": [],
    "staleness": [],
    "search": [],
    "sdk": [],
    "soak": [],
    "profiler": ["--rounds", "3"],
    "per_example": [],
    "profiler_memory": [],
    "tails": [],
    "shards": ["--rounds", "3"],
    "worker_start": [],
    "meter": [],
    "gate": [],
    "deltas": [],
}


def run(name: str, folder: Path) -> list[Ratio] | None:
    """What it published; None when it failed."""
    results = folder / f"{name}.jsonl"
    environment = os.environ | {RESULTS: str(results)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *ALL[name]]
    print(f"\n=== {' '.join(command[1:])}", flush=True)
    if subprocess.run(command, env=environment, cwd=REPOSITORY).returncode:
        return None
    lines = results.read_text().splitlines() if results.exists() else []
    return [Ratio(**json.loads(line) | {"ratios": tuple(json.loads(line)["ratios"])}) for line in lines]


def machine() -> str:
    model = "unknown processor"
    if (told := Path("/proc/cpuinfo")).exists():
        model = next(
            (line.partition(":")[2].strip() for line in told.read_text().splitlines() if "model name" in line), model
        )
    return f"{os.cpu_count()} cores ({model}), {platform.system()}, Python {platform.python_version()}, no GPU used"


def written(page: str, rows: list[str], when: str, names: list[str]) -> str:
    """The page with these rows: all of its table, or of a part of the benchmarks those that they replace."""
    before, _, rest = page.partition(BEGIN)
    told, _, after = rest.partition(END)
    if not names:
        lines = [f"{when}.", "", *rows]
    else:
        fresh = {_work(row): row for row in rows[1:]}
        lines = [fresh.pop(_work(line), line) if line.startswith("|") else line for line in told.strip().splitlines()]
        part = f"- {', '.join(f'`{name}`' for name in names)}: {when}."
        first = next(number for number, line in enumerate(lines) if line.startswith("|"))
        lines = [*lines[: first - 1], part, "", *lines[first:], *fresh.values()]
    return "\n".join([before + BEGIN, *lines, "", END]) + after


def _work(row: str) -> tuple[str, ...]:
    """What names a row of the table: the work, and what it is held against."""
    return tuple(row.split("|")[1:3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)} (all)")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ALL):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    rows, failed = [HEADER], []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or ALL:
            found = run(name, Path(folder))
            if found is None:
                failed.append(name)
            rows += [row.line() for row in found or []]
    when = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, load {os.getloadavg()[0]:.1f} at the end"
    print("\n".join(["", *rows, "", when]))
    if failed:
        print(f"failed: {', '.join(failed)}")
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(), rows, when, arguments.names))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
