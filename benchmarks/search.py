"""Searching and listing at 100,000 models and 1,000,000 versions beside the same at 1,000 models: latency over HTTP.

python -m benchmarks.search [--rounds 5] [--models 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

import asyncpg
import httpx2

from benchmarks.registry import registry
from benchmarks.results import Ratio, interleaved, publish, ratios

FEW = 1_000
REQUESTS = 30
WORDS = ("llama", "qwen", "gemma", "mistral", "phi", "falcon", "olmo", "smollm", "granite", "pythia")

# A model has a checkpoint of ten versions; its name begins with one of a hundred organisations.
FILL = """
INSERT INTO labs (name) VALUES ('everyone');
INSERT INTO keys (lab_id, name, prefix, hash, scopes)
    SELECT id, '', '', 'key'::bytea, '{{}}' FROM labs WHERE name = 'everyone';
INSERT INTO models (name, lab_id)
    SELECT 'org-' || lpad((g % 100)::text, 2, '0') || '/' || (ARRAY{words})[1 + g % 10] || '-' || lpad(g::text, 6, '0'),
           l.id
    FROM generate_series(1, {models}) g, labs l WHERE l.name = 'everyone';
INSERT INTO checkpoints (model_id, fraction, last_version) SELECT id, 0.8, 10 FROM models;
INSERT INTO documents (digest, checkpoint_id, body, size, layer_count, warnings)
    SELECT sha256((c.id || '/' || n)::bytea), c.id, '\\x7b7d', 2, 0, '[]' FROM checkpoints c, generate_series(1, 10) n;
INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id)
    SELECT d.checkpoint_id, row_number() OVER (PARTITION BY d.checkpoint_id), l.id, k.id, d.id
    FROM documents d, labs l, keys k WHERE l.name = 'everyone' AND k.lab_id = l.id;
VACUUM ANALYZE;
"""


async def fill(database_url: str, models: int) -> None:
    connection = await asyncpg.connect(database_url, timeout=60)
    try:
        words = [f"'{word}'" for word in WORDS]
        for statement in FILL.format(models=models, words=f"[{','.join(words)}]").split(";\n"):
            if statement.strip():
                await connection.execute(statement, timeout=1_800)
    finally:
        await connection.close()


def latency(client: httpx2.Client, path: str) -> float:
    """Median seconds of a request."""
    times = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        client.get(path).raise_for_status()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=int, default=100_000)
    arguments = parser.parse_args()
    # both have these
    model = "org-42/gemma-000042"
    paths = {
        "the first page of models": "/v1/models",
        "a page from the middle": "/v1/models?cursor=WyJvcmctNTAvIl0",  # ["org-50/"]
        "search, 1 in 10": "/v1/models?q=gemma",
        "search, one model": "/v1/models?q=gemma-000042",
        "search, nothing": "/v1/models?q=absent-model",
        "search, two letters": "/v1/models?q=42",
        "search, two letters, nothing": "/v1/models?q=zz",
        "a model": f"/v1/models/{model}",
        "its checkpoints": f"/v1/models/{model}/checkpoints",
        "its versions": f"/v1/models/{model}/checkpoints/0.8/versions",
    }
    with registry() as small, registry() as large:
        asyncio.run(fill(small.database_url, FEW))
        asyncio.run(fill(large.database_url, arguments.models))
        with (
            httpx2.Client(base_url=small.url, trust_env=False, timeout=60) as few,
            httpx2.Client(base_url=large.url, trust_env=False, timeout=60) as many,
        ):
            works: dict[str, Callable[[], float]] = {}
            for name, path in paths.items():
                works[f"{name} few"] = lambda path=path: latency(few, path)  # type: ignore[misc]
                works[f"{name} many"] = lambda path=path: latency(many, path)  # type: ignore[misc]
            found = interleaved(arguments.rounds, **works)
    for name in paths:
        print(f"{name}: {1000 * statistics.median(found[f'{name} many']):.1f} ms")
    publish(
        [
            Ratio(
                f"{name}, of {arguments.models:,}",
                f"the same of {FEW:,}",
                ratios(found, f"{name} many", f"{name} few"),
                2,
            )
            for name in paths
        ]
    )


if __name__ == "__main__":
    main()
