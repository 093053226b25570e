"""Aggregating 1,000 blueprints of 288 layers, as table and as consensus.

python -m benchmarks.aggregate [--rounds 3] [--labs 1000]

The references: the same SQL in psql, written to a file; and the paper's function (appendix A.2, its `return` moved out
of the loop) over the same documents as files in the page cache. The service's answer is read from its socket and
thrown away. The floor of the table is its bytes, ready in the memory of a bare application, read in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import ARRAY, Numeric, String, bindparam, text
from sqlalchemy.dialects import postgresql

from app.registry.aggregation import CENTRES, LAYERS_OF_A_CHECKPOINT, TABLE
from app.registry.selection import parameters
from benchmarks.filling import publish_as_labs
from benchmarks.registry import MODEL, document, registry, serving
from benchmarks.results import Ratio, interleaved, publish, ratios, seconds
from gradient_blueprints.models import Blueprint
from gradient_blueprints.statistics_models import Aggregation

NDJSON = "application/x-ndjson"


def documents(labs: int) -> list[dict[str, Any]]:
    """Each lab's own scale, and noise of its own on every layer."""
    draw = random.Random(0)  # noqa: S311 - a sample, not a secret
    made = []
    for number in range(labs):
        plain = document(norm=1 + number)
        for layer in plain["layers"]:
            layer["gradient_norm"] = float(f"{layer['gradient_norm'] * draw.lognormvariate(0, 0.3):.6g}")
        made.append(plain)
    return made


def as_the_paper_does(files: list[Path]) -> dict[Any, Any]:
    combined = {}
    for path in files:
        data = json.loads(path.read_bytes())
        model_id = data["model_id"]
        checkpoint = data["training_checkpoint"]
        for layer in data["layers"]:
            combined[model_id, checkpoint, layer["id"]] = layer
    return combined


def sql(statement: str, values: dict[str, Any]) -> str:
    """With the values written into it, as psql takes it."""
    typed = {
        "models": ARRAY(String),
        "labs": ARRAY(String),
        "checkpoints": ARRAY(Numeric),
        "tags": ARRAY(String),
        "digests": ARRAY(String),
    }
    bound = text(statement).bindparams(
        *(bindparam(name, value, typed.get(name)) for name, value in values.items() if f":{name}" in statement)
    )
    # the one dialect whose literals psql reads; asyncpg's placeholders are not written out
    return str(bound.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]


def psql(database_url: str, folder: Path, *statements: str) -> None:
    script = folder / "query.sql"
    script.write_text(";\n".join(statements) + ";\n")
    command = [
        "psql",
        database_url,
        "--no-psqlrc",
        "-q",
        "-At",
        "-v",
        "ON_ERROR_STOP=1",
        "-f",
        str(script),
        "-o",
        str(folder / "out"),
    ]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labs", type=int, default=1_000)
    arguments = parser.parse_args()
    patient = {"BLUEPRINTS_STATEMENT_SECONDS": "600", "BLUEPRINTS_REQUEST_SECONDS": "600"}
    with registry(patient) as served, ExitStack() as stack:
        made = documents(arguments.labs)
        asyncio.run(publish_as_labs(served.database_url, made))
        files = []
        for number, plain in enumerate(made):
            path = served.folder / f"{number}.json"
            path.write_bytes(Blueprint.model_validate(plain).to_canonical_bytes())
            files.append(path)
        wanted = Aggregation(models=(MODEL,))
        of_checkpoint = parameters(wanted, checkpoint_id=1)
        with httpx2.Client(base_url=served.url, trust_env=False, timeout=600) as client:

            def read(method: str, url: str, **request: Any) -> None:
                with client.stream(method, url, **request) as answer:
                    answer.raise_for_status()
                    for _ in answer.iter_raw():
                        pass

            def ask(accept: str, **more: str) -> None:
                read("POST", "/v1/aggregate", json={"models": [MODEL], **more}, headers={"Accept": accept})

            folder = served.folder
            with client.stream("POST", "/v1/aggregate", json={"models": [MODEL]}, headers={"Accept": NDJSON}) as answer:
                (folder / "table").write_bytes(b"".join(answer.iter_raw()))
            ready = stack.enter_context(
                serving(["benchmarks.bare"], {"BENCHMARK_BODY": str(folder / "table")}, folder / "bare.log", "/")
            )[0]

            table = sql(TABLE, parameters(wanted))
            consensus = [sql(statement, of_checkpoint) for statement in (CENTRES, LAYERS_OF_A_CHECKPOINT)]
            reference = partial(psql, served.database_url, served.folder)
            found = interleaved(
                arguments.rounds,
                table=partial(seconds, partial(ask, NDJSON)),
                csv=partial(seconds, partial(ask, "text/csv")),
                table_psql=partial(seconds, partial(reference, table)),
                consensus=partial(seconds, partial(ask, NDJSON, result="consensus")),
                consensus_psql=partial(seconds, partial(reference, *consensus)),
                floor=partial(seconds, partial(read, "GET", ready)),
                paper=partial(seconds, partial(as_the_paper_does, files)),
            )
    print({name: [round(value, 3) for value in values] for name, values in found.items()})
    work = f"{arguments.labs:,} blueprints of 288 layers"
    publish(
        [
            Ratio(f"{work} as table (NDJSON)", "the same SQL in psql", ratios(found, "table", "table_psql"), 1.3),
            Ratio(f"{work} as table (CSV)", "the table's SQL in psql", ratios(found, "csv", "table_psql")),
            Ratio(f"{work} as consensus", "the same SQL in psql", ratios(found, "consensus", "consensus_psql"), 1.3),
            Ratio(
                f"{work} as table (NDJSON), times faster",
                "the paper's function over files",
                ratios(found, "paper", "table"),
                20,
                at_least=True,
            ),
            Ratio(
                "the floor: the table's bytes out of memory over a socket, times faster",
                "the paper's function over files",
                ratios(found, "paper", "floor"),
            ),
        ]
    )


if __name__ == "__main__":
    main()
