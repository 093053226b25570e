"""The reference of the fetches: a bare Starlette application that answers the same bytes on the same uvicorn.

    python -m benchmarks.bare --port 8001      BENCHMARK_BODY names the file of the answer

It runs as `python -m app serve` runs the API: one process, uvicorn's own choices, its access log on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def application() -> Starlette:
    body = Path(os.environ["BENCHMARK_BODY"]).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(body, media_type="application/json", headers={"ETag": '"bare"'})

    async def unchanged(_: Request) -> Response:
        return Response(status_code=304, headers={"ETag": '"bare"'})

    return Starlette(routes=[Route("/", answer), Route("/unchanged", unchanged)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run("benchmarks.bare:application", factory=True, port=parser.parse_args().port)
