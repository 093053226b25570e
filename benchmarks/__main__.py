"""Runs every benchmark, one after the other: `make bench`. Each prints ratios against a reference in the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    failed = []
    for script in sorted(Path(__file__).parent.glob("[!_]*.py")):
        print(f"\n=== {script.name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{script.stem}"]).returncode:
            failed.append(script.name)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall benchmarks ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
