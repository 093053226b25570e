"""Runs every benchmark, one after the other, and prints one table of all ratios: `make bench`.

python -m benchmarks [NAME ...] [--write]

With --write the table goes into docs/performance.md, between its markers.
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
    "profiler": [],
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
    table = "\n".join(rows)
    when = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, load {os.getloadavg()[0]:.1f} at the end"
    print(f"\n{table}\n\n{when}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{when}.\n\n{table}\n\n{END}{after}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
