"""A registry to measure: a durable PostgreSQL, the API as an operator runs it, and documents in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from app.database import migrate
from app.embedded import postgres
from app.embedded.processes import free_port
from app.registry.keys import generate_secret
from gradient_blueprints import Client, Scope

READY_SECONDS = 60.0
LAYERS = 288
MODEL = "bench/foundation-7b"
CHECKPOINT = 0.8


@dataclass(frozen=True)
class Registry:
    url: str
    database_url: str
    admin_key: str
    key: str
    """Of the lab `bench`, with the scopes publish, profile and read."""
    folder: Path
    process: subprocess.Popen[bytes]


@contextmanager
def database() -> Iterator[tuple[str, Path]]:
    """The URL of a migrated database that keeps what it acknowledged, and a folder."""
    with tempfile.TemporaryDirectory(prefix="blueprints-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = postgres.start(folder / "postgres")
        try:
            migrate(server.url)
            yield server.url, folder
        finally:
            postgres.stop(server)


@contextmanager
def registry(settings: Mapping[str, str] | None = None) -> Iterator[Registry]:
    with database() as (database_url, folder), ExitStack() as stack:
        admin_key = generate_secret()
        settings = {
            "BLUEPRINTS_DATABASE_URL": database_url,
            "BLUEPRINTS_SECRET": "s" * 32,
            "BLUEPRINTS_ADMIN_KEY": admin_key,
            "BLUEPRINTS_STORE": str(folder / "store"),
            # Beyond what a load generator sends, so that limits are counted as for anybody and strike nowhere.
            "BLUEPRINTS_KEY_REQUESTS_PER_MINUTE": str(10**9),
            "BLUEPRINTS_ADDRESS_REQUESTS_PER_MINUTE": str(10**9),
            **(settings or {}),
        }
        url, process = stack.enter_context(serving(["app", "serve"], settings, folder / "api.log", "/readyz"))
        with Client(url, api_key=admin_key, cache=False) as admin:
            admin.create_lab("bench")
            key = admin.create_key("bench", [Scope.PUBLISH, Scope.PROFILE, Scope.READ]).secret
        yield Registry(url, database_url, admin_key, key, folder, process)


@contextmanager
def serving(
    module: list[str], settings: Mapping[str, str], log: Path, path: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m MODULE… --port P` until the block ends; ready when `path` answers."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        command = [sys.executable, "-m", *module, "--port", str(port)]
        process = subprocess.Popen(command, env=clean | dict(settings), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(url + path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read_text()}")
            time.sleep(0.1)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def document(norm: float = 0.1, model_id: str = MODEL, layers: int = LAYERS) -> dict[str, Any]:
    """A blueprint as the profiler writes them, without the longest columns: 46 kB at 288 layers."""
    return {
        "model_id": model_id,
        "training_checkpoint": CHECKPOINT,
        "layers": [
            {
                "id": f"model.layers.{index // 7}.part{index % 7}.weight",
                "gradient_norm": round(norm / (1 + index), 9),
                "alpha": 1.47,
                "gamma": 0.4,
                "k_star": 0.15,
                "parameters": 590_000 + index,
                "depth": index // 7,
            }
            for index in range(layers)
        ],
    }
