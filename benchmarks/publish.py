"""Publishing 288 layers over HTTP beside the COPY of the same rows and one commit through the bare driver.

python -m benchmarks.publish [--rounds 5] [--count 60]

Each round times single publications, as the SDK sends them, one after the other, and single COPYs; the ratio is of
their medians. Both are durable: the database flushes before it acknowledges. The floor is what a publication takes
before its first statement: reading the document, validating it, its canonical form, its digest and its review.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import asyncpg
import httpx2

from app.registry.blueprints import LAYER_COLUMNS, layer_record
from app.registry.documents import parse_json
from benchmarks.registry import document, registry
from benchmarks.results import Ratio, publish
from gradient_blueprints.models import Blueprint


def publications(client: httpx2.Client, first: int, count: int) -> list[float]:
    """Seconds of each."""
    bodies = [
        Blueprint.model_validate(document(norm=1 + first + number)).to_canonical_bytes() for number in range(count)
    ]
    times = []
    for body in bodies:
        began = time.perf_counter()
        answer = client.post("/v1/blueprints", content=body, headers={"Content-Type": "application/json"})
        times.append(time.perf_counter() - began)
        assert answer.status_code == 201, answer.text
    return times


def readings(first: int, count: int) -> list[float]:
    """Seconds of each."""
    times = []
    for number in range(count):
        body = Blueprint.model_validate(document(norm=1 + first + number)).to_canonical_bytes()
        began = time.perf_counter()
        parse_json(body)
        times.append(time.perf_counter() - began)
    return times


async def copies(database_url: str, first: int, count: int) -> list[float]:
    """Seconds of each: the layers' rows, in a transaction."""
    layers = Blueprint.model_validate(document()).layers
    connection = await asyncpg.connect(database_url)
    times = []
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS copied (LIKE layers INCLUDING INDEXES)")
        for number in range(first, first + count):
            records = [layer_record(number, position, layer) for position, layer in enumerate(layers)]
            began = time.perf_counter()
            async with connection.transaction():
                await connection.copy_records_to_table("copied", columns=LAYER_COLUMNS, records=records)
            times.append(time.perf_counter() - began)
    finally:
        await connection.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=60)
    arguments = parser.parse_args()
    count = arguments.count
    with registry() as served:
        headers = {"Authorization": f"Bearer {served.key}"}
        with httpx2.Client(base_url=served.url, headers=headers, trust_env=False, timeout=60) as client:
            publications(client, 10**6, count)  # connections, plans, the checkpoint's row
            asyncio.run(copies(served.database_url, 10**6, count))
            ratios, tails, medians, floors = [], [], [], []
            for number in range(arguments.rounds):
                mine = publications(client, number * count, count)
                theirs = asyncio.run(copies(served.database_url, 2 * 10**6 + number * count, count))
                ratios.append(statistics.median(mine) / statistics.median(theirs))
                medians.append(statistics.median(mine))
                floors.append(statistics.median(readings(number * count, count)) / statistics.median(theirs))
                tails.append(statistics.quantiles(mine, n=100)[98] / statistics.median(mine))
    publish(
        [
            Ratio("publish 288 layers", "COPY of its rows and a commit, bare driver", tuple(ratios), 2.5),
            Ratio("the floor: reading and validating 288 layers", "the same COPY", tuple(floors)),
            Ratio("publish 288 layers, p99", "its p50", tuple(tails), 5),
        ]
    )
    print(f"p50 {1000 * statistics.median(medians):.1f} ms")


if __name__ == "__main__":
    main()
