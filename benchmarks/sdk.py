"""The SDK: how long its import takes beside what it cannot do without, and a cached fetch beside reading its file.

python -m benchmarks.sdk [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.registry import CHECKPOINT, MODEL, document, registry
from benchmarks.results import Ratio, interleaved, publish, ratios
from gradient_blueprints import Client

IMPORTS = {
    "python": "pass",
    "package": "import gradient_blueprints",
    "client": "from gradient_blueprints import Client",
    "needed": "import httpx2, pydantic.main",
}
REPETITIONS = 100


def seconds_of_a_process(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    return time.perf_counter() - began


def least_seconds(work: Callable[[], object]) -> float:
    """Of many: the work takes less than a millisecond."""
    least = float("inf")
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - began)
    return least


def imports(rounds: int) -> list[Ratio]:
    found = interleaved(rounds, **{name: partial(seconds_of_a_process, code) for name, code in IMPORTS.items()})
    start = min(found.pop("python"))
    beyond = {name: [taken - start for taken in times] for name, times in found.items()}
    print(
        {name: f"{1000 * min(times):.0f} ms" for name, times in beyond.items()}, f"beyond Python's {1000 * start:.0f}"
    )
    reference = "import httpx2, pydantic.main"
    return [
        Ratio("import gradient_blueprints", reference, ratios(beyond, "package", "needed"), 1.5),
        Ratio("from gradient_blueprints import Client", reference, ratios(beyond, "client", "needed"), 1.5),
    ]


def cached_fetch(rounds: int) -> list[Ratio]:
    with (
        registry() as served,
        tempfile.TemporaryDirectory() as folder,
        Client(served.url, api_key=served.key, cache=Path(folder)) as client,
    ):
        client.publish_blueprint(document())
        client.fetch_blueprint(MODEL, CHECKPOINT, version=1)
        content = max(
            (path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        found = interleaved(
            rounds,
            fetch=lambda: least_seconds(lambda: client.fetch_blueprint(MODEL, CHECKPOINT, version=1)),
            file=lambda: least_seconds(lambda: json.loads(content.read_bytes())),
        )
    print({name: f"{1000 * min(times):.2f} ms" for name, times in found.items()})
    return [
        Ratio(
            "cached fetch of a version: verified, validated, 288 layers",
            "reading its file and json.loads",
            ratios(found, "fetch", "file"),
            2,
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    publish([*imports(rounds), *cached_fetch(rounds)])


if __name__ == "__main__":
    main()
