"""A fetch by the route of a peer, MLflow's registry: resolve an alias, then download the artifact that it names.

    python -m benchmarks.peer [--rounds 3] [--seconds 5]

MLflow's server runs in a virtual environment of its own (.bench/mlflow, installed at the first run), with one worker
process, as our API has one, and on a database of the same PostgreSQL. Its two requests count as one fetch; ours is one
request. 16 connections.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx2

from app.embedded.processes import free_port
from benchmarks.fetch import need_wrk, requests_per_second
from benchmarks.registry import CHECKPOINT, MODEL, document, registry
from benchmarks.results import Ratio, interleaved, publish, ratios
from gradient_blueprints import Client
from gradient_blueprints.models import Blueprint

MLFLOW = "3.17.2"
ENVIRONMENT = Path(".bench/mlflow")
CONNECTIONS = 16
START_SECONDS = 180.0
ALTERNATE = """
local second = false
request = function()
    second = not second
    return wrk.format("GET", second and "{first}" or "{then}")
end
"""


def install() -> Path:
    """The environment's folder of programs."""
    programs = ENVIRONMENT.absolute() / "bin"
    if not (programs / "mlflow").exists():
        print(f"installing mlflow {MLFLOW} into {ENVIRONMENT}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        wanted = [f"mlflow=={MLFLOW}", "psycopg[binary]"]
        subprocess.run([programs / "python", "-m", "pip", "install", "-q", *wanted], check=True)
    return programs


@contextmanager
def mlflow(database_url: str, folder: Path) -> Iterator[str]:
    programs, port = install(), free_port()
    artifacts = folder / "artifacts"
    artifacts.mkdir()
    options = ["--backend-store-uri", database_url, "--artifacts-destination", artifacts.as_uri(), "--serve-artifacts"]
    command = [
        str(programs / "mlflow"),
        "server",
        *options,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder)}
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not _healthy(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / "mlflow.log").read_text()[-4_000:])
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=2, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def fill(url: str, body: bytes) -> tuple[str, str]:
    """The paths of its two requests."""
    with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:

        def post(path: str, **content: str) -> Any:
            answer = client.post(f"/api/2.0/mlflow/{path}", json=content)
            if answer.is_error:
                raise SystemExit(f"{path}: {answer.text}")
            return answer.json()

        run = post("runs/create", experiment_id="0")["run"]["info"]  # what an artifact must belong to
        folder = run["artifact_uri"].removeprefix("mlflow-artifacts:/")
        artifact = f"/api/2.0/mlflow-artifacts/artifacts/{folder}/blueprint.json"
        client.put(artifact, content=body).raise_for_status()
        post("registered-models/create", name="foundation-7b")
        source = f"{run['artifact_uri']}/blueprint.json"
        post("model-versions/create", name="foundation-7b", source=source, run_id=run["run_id"])
        post("registered-models/alias", name="foundation-7b", alias="stable", version="1")
        resolve = "/api/2.0/mlflow/registered-models/alias?name=foundation-7b&alias=stable"
        assert client.get(resolve).raise_for_status().json()["model_version"]["version"] == "1"
        assert client.get(artifact).raise_for_status().content == body
        return resolve, artifact


async def make_database(database_url: str) -> str:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("CREATE DATABASE mlflow")
    finally:
        await connection.close()
    return database_url.rpartition("/")[0] + "/mlflow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    arguments = parser.parse_args()
    need_wrk()
    with registry() as served:
        with Client(served.url, api_key=served.key, cache=False) as client:
            client.publish_blueprint(document())
            client.set_alias(MODEL, "stable", CHECKPOINT, 1)
        body = Blueprint.model_validate(document()).to_canonical_bytes()
        with mlflow(asyncio.run(make_database(served.database_url)), served.folder) as url:
            resolve, artifact = fill(url, body)
            script = served.folder / "alternate.lua"
            script.write_text(ALTERNATE.replace("{first}", resolve).replace("{then}", artifact))
            load = partial(requests_per_second, connections=CONNECTIONS, seconds=arguments.seconds)
            found = interleaved(
                arguments.rounds,
                ours=partial(load, f"{served.url}/v1/models/{MODEL}/aliases/stable/blueprint"),
                mlflow=lambda: load(url, script=script) / 2,
            )
    print({name: [round(value, 1) for value in values] for name, values in found.items()}, "fetches a second")
    publish(
        [
            Ratio(
                f"fetch by alias, {CONNECTIONS} connections",
                f"MLflow {MLFLOW}: resolve the alias, download the artifact; fetches per second",
                ratios(found, "ours", "mlflow"),
                100,
                at_least=True,
            )
        ]
    )


if __name__ == "__main__":
    main()
