"""Half an hour's mixed load as fast as it goes: memory of every process flat, no error, the slowest requests stable.

    python -m benchmarks.soak [--operations 36000] [--clients 8]

36,000 operations are half an hour of twenty a second: fetches of every kind, publications, lists and searches,
consensus, staleness checks, and selections. Memory is sampled twice a second; the first quarter of the operations warms
caches and pools, and the last quarter is compared with the second.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import httpx2
import psutil

from benchmarks.registry import MODEL, Registry, document, registry
from benchmarks.results import Ratio, publish
from gradient_blueprints.models import Blueprint

LAYERS = 96
MODELS = [f"{MODEL}-{number}" for number in range(20)]
NEWEST = "/v1/models/{model}/checkpoints/0.8"


class Load:
    """Operations drawn at random, each by the seconds that it took."""

    def __init__(self, served: Registry, operations: int) -> None:
        self._served = served
        self._left = operations
        self._total = operations
        self._lock = threading.Lock()
        self.seconds: dict[int, list[float]] = defaultdict(list)
        """By quarter."""
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    @property
    def quarter(self) -> int:
        return min(3, 4 * (self._total - self._left) // self._total)

    def run(self, seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
        headers = {"Authorization": f"Bearer {self._served.key}"}
        open_client = httpx2.Client(base_url=self._served.url, trust_env=False, timeout=60)
        with (
            open_client,
            httpx2.Client(base_url=self._served.url, trust_env=False, timeout=60, headers=headers) as client,
        ):
            kinds: list[tuple[int, str, Callable[[str], httpx2.Response]]] = [
                (30, "fetch", lambda model: open_client.get(f"{NEWEST.format(model=model)}/blueprint")),
                (20, "fetch with a key", lambda model: client.get(f"{NEWEST.format(model=model)}/blueprint")),
                (
                    10,
                    "csv",
                    lambda model: client.get(f"{NEWEST.format(model=model)}/blueprint", headers={"Accept": "text/csv"}),
                ),
                (
                    10,
                    "publish",
                    lambda model: client.post("/v1/blueprints", json=document(draw.random(), model, LAYERS)),
                ),
                (10, "versions", lambda model: client.get(f"{NEWEST.format(model=model)}/versions")),
                (10, "search", lambda model: open_client.get("/v1/models", params={"q": model[-6:]})),
                (4, "page", lambda model: open_client.get("/", headers={"Accept": "text/html"})),
                (
                    2,
                    "consensus",
                    lambda model: client.post("/v1/aggregate", json={"models": [model], "result": "consensus"}),
                ),
                (
                    2,
                    "staleness",
                    lambda model: client.post(f"{NEWEST.format(model=model)}/staleness", json={"local": sample(draw)}),
                ),
                (2, "404", lambda model: open_client.get(f"/v1/models/{model}-absent")),
            ]
            weights = [weight for weight, _, _ in kinds]
            while self._take():
                ((_, name, ask),) = draw.choices(kinds, weights)
                began = time.perf_counter()
                answer = ask(draw.choice(MODELS))
                taken = time.perf_counter() - began
                with self._lock:
                    self.done[name] += 1
                    self.seconds[self.quarter].append(taken)
                    if answer.is_error and (name, answer.status_code) != ("404", 404):
                        self.errors[f"{name}: {answer.status_code} {answer.text[:200]}"] += 1

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0


def sample(draw: random.Random) -> dict[str, object]:
    layers = document(layers=LAYERS)["layers"]
    return {
        "statistic": "gradient_norm",
        "layers": [
            {"id": layer["id"], "batches": [layer["gradient_norm"] * draw.lognormvariate(0, 0.2) for _ in range(8)]}
            for layer in layers
        ],
    }


def megabytes(registry_process: int) -> dict[str, float]:
    """Of the API, and of PostgreSQL's processes together without what they share."""
    found: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        try:
            name = "API" if process.pid == registry_process else process.name()
            memory = process.memory_info()
            found[name] += (memory.rss - getattr(memory, "shared", 0)) / 1e6
        except psutil.Error:
            continue  # it has ended
    return {name: found[name] for name in ("API", "postgres") if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=36_000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with registry({"BLUEPRINTS_DOCUMENT_CACHE_BYTES": str(16 << 20)}) as served:
        with httpx2.Client(base_url=served.url, trust_env=False, timeout=60) as client:
            for model in MODELS:
                body = Blueprint.model_validate(document(1.0, model, LAYERS)).to_dict()
                key = {"Authorization": f"Bearer {served.key}"}
                client.post("/v1/blueprints", json=body, headers=key).raise_for_status()
        load = Load(served, options.operations)
        threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(options.clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        held: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        while any(thread.is_alive() for thread in threads):
            for name, amount in megabytes(served.process.pid).items():
                held[name][load.quarter].append(amount)
            time.sleep(0.5)
        taken = time.monotonic() - began
    done = sum(load.done.values())
    print(f"{done} operations in {taken:.0f} s, {done / taken:.0f} a second: {dict(load.done)}")
    print(f"errors: {sum(load.errors.values())} {dict(load.errors.most_common(5))}")
    for name, quarters in held.items():
        print(f"{name}: {[round(statistics.median(quarters[number])) for number in sorted(quarters)]} MB by quarter")
    tails = {number: statistics.quantiles(times, n=100)[98] for number, times in sorted(load.seconds.items())}
    print(f"p99 by quarter: {[f'{1000 * tail:.0f} ms' for tail in tails.values()]}")
    rows = [
        Ratio(
            f"memory of {name}, last quarter of {options.operations:,} mixed operations",
            "its second quarter",
            (statistics.median(quarters[3]) / statistics.median(quarters[1]),),
            1.1,
        )
        for name, quarters in held.items()
    ]
    rows.append(Ratio("p99 of mixed operations, last quarter", "the second quarter", (tails[3] / tails[1],), 1.25))
    publish(rows)
    if load.errors:
        raise SystemExit("there were errors")


if __name__ == "__main__":
    main()
