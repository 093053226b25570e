"""How long the SDK takes to import, beyond Python's own start and beside what it cannot do without.

python benchmarks/sdk_import.py [ROUNDS]
"""

from __future__ import annotations

import subprocess
import sys
import time

CASES = {
    "Python": "pass",
    "gradient_blueprints": "import gradient_blueprints",
    "its Client": "from gradient_blueprints import Client",
    "httpx2 and pydantic": "import httpx2, pydantic.main",
}


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    return time.perf_counter() - began


def main(rounds: int) -> None:
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(rounds):  # rounds outside, so that a slow moment of the machine meets every case
        for name, code in CASES.items():
            best[name] = min(best[name], seconds(code))
    start = best.pop("Python")
    needed = best["httpx2 and pydantic"] - start
    print(f"best of {rounds}; Python's own start, {1000 * start:.0f} ms, is taken off")
    for name, taken in best.items():
        beyond = taken - start
        print(f"{name:22} {1000 * beyond:6.1f} ms   {beyond / needed:5.2f} times httpx2 and pydantic")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
