"""`python -m torture.contract`: Schemathesis against the served OpenAPI document, all checks, with and without a key.

`make torture` calls it after the faults. It starts a Postgres and an API process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.database import migrate
from app.embedded import postgres
from app.embedded.processes import free_port
from app.registry.keys import generate_secret
from gradient_blueprints import Client
from gradient_blueprints.errors import BlueprintsError

REPOSITORY = Path(__file__).parents[1]
SETTINGS = Path(__file__).with_name("schemathesis.toml")
ALL_PHASES = "examples,coverage,fuzzing,stateful"


def run_schemathesis(
    url: str, key: str | None, *, seed: int, examples: int, phases: str = ALL_PHASES
) -> subprocess.CompletedProcess[str]:
    """What the command said; its status is 0 when every answer kept to the document."""
    command = [sys.executable, "-m", "schemathesis.cli", f"--config-file={SETTINGS}", "run", f"{url}/v1/openapi.json"]
    command += ["--checks=all", f"--phases={phases}", f"--max-examples={examples}", f"--seed={seed}"]
    command += ["--generation-database=none", "--warnings=off", "--no-color"]
    if key is not None:
        command.append(f"--header=Authorization: Bearer {key}")
    with tempfile.TemporaryDirectory(prefix="schemathesis-") as folder:
        return subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, str]]:
    """URL and admin key of a registry with a database of its own, whose API is a process of its own."""
    server = postgres.start(folder / "postgres", durable=False)
    try:
        migrate(server.url)
        key, port = generate_secret(), free_port()
        environment = os.environ | {
            "BLUEPRINTS_DATABASE_URL": server.url,
            "BLUEPRINTS_SECRET": generate_secret(),
            "BLUEPRINTS_ADMIN_KEY": key,
            "BLUEPRINTS_STORE": str(folder / "store"),
            # Thousands of requests a minute come without a valid key here, all from one address.
            "BLUEPRINTS_ADDRESS_REQUESTS_PER_MINUTE": "0",
        }
        command = [sys.executable, "-m", "app", "serve", "--port", str(port)]
        with (folder / "api.log").open("wb") as log:
            api = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, key)
            yield url, key
        finally:
            api.terminate()
            api.wait()
    finally:
        postgres.stop(server)


def _wait_until_ready(url: str, key: str) -> None:
    deadline = time.monotonic() + 60
    with Client(url, api_key=key, cache=False, offline=False, timeout=5) as admin:
        while True:
            try:
                admin.whoami()
            except BlueprintsError:
                if time.monotonic() > deadline:
                    raise
            else:
                return


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture.contract", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=20, help="of each operation (default: %(default)s)")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder, _served(Path(folder)) as (url, key):
        for who, with_key in (("an administrator", key), ("nobody", None)):
            found = run_schemathesis(url, with_key, seed=arguments.seed, examples=arguments.examples)
            print(f"\nSchemathesis as {who}\n{found.stdout}", flush=True)
            failed += found.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
