"""Fetches beside a bare application that returns the same bytes: requests per second under wrk.

python -m benchmarks.fetch [--rounds 3] [--seconds 3]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.registry import CHECKPOINT, MODEL, document, registry, serving
from benchmarks.results import Ratio, interleaved, publish, ratios
from gradient_blueprints import Client

CONNECTIONS = (16, 64)


def need_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("This needs wrk, a load generator: apt-get install wrk, or brew install wrk.")


def requests_per_second(url: str, connections: int, seconds: int, *headers: str, script: Path | None = None) -> float:
    """Of wrk, on one thread; `script` is Lua that makes its requests."""
    given = [part for header in headers for part in ("-H", header)]
    given += ["-s", str(script)] if script else []
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency", *given, url]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in told or "Socket errors" in told:
        raise SystemExit(f"{' '.join(command)}:\n{told}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", told)
    assert found is not None, told
    return float(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    arguments = parser.parse_args()
    need_wrk()
    with registry() as served:
        with Client(served.url, api_key=served.key, cache=False) as client:
            digest = client.publish_blueprint(document()).digest
        by_digest = f"{served.url}/v1/blueprints/{digest}"
        newest = f"{served.url}/v1/models/{MODEL}/checkpoints/{CHECKPOINT}/blueprint"
        with Client(served.url, cache=False) as client:
            body = client.fetch_blueprint(MODEL, CHECKPOINT).to_canonical_bytes()
        (served.folder / "body.json").write_bytes(body)
        settings = {"BENCHMARK_BODY": str(served.folder / "body.json")}
        with serving(["benchmarks.bare"], settings, served.folder / "bare.log", "/") as (bare, _):
            rows = []
            for connections in CONNECTIONS:
                load = partial(requests_per_second, connections=connections, seconds=arguments.seconds)
                known = f'If-None-Match: "{digest}"'
                found = interleaved(
                    arguments.rounds,
                    bare=partial(load, f"{bare}/"),
                    digest=partial(load, by_digest),
                    newest=partial(load, newest),
                    bare_unchanged=partial(load, f"{bare}/unchanged"),
                    unchanged=partial(requests_per_second, newest, connections, arguments.seconds, known),
                    unchanged_digest=partial(requests_per_second, by_digest, connections, arguments.seconds, known),
                )
                for work, name, reference, bound in (
                    ("fetch by digest", "digest", "bare", 0.9),
                    ("fetch of the newest version", "newest", "bare", 0.7),
                    ("304 of the newest version", "unchanged", "bare_unchanged", 0.7),
                    ("304 by digest", "unchanged_digest", "bare_unchanged", 0.7),
                ):
                    rows.append(
                        Ratio(
                            f"{work}, {connections} connections, {len(body) / 1000:.0f} kB",
                            "bare Starlette, requests per second",
                            ratios(found, name, reference),
                            bound,
                            at_least=True,
                        )
                    )
                print({name: [round(value) for value in values] for name, values in found.items()})
            publish(rows)


if __name__ == "__main__":
    main()
