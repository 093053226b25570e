"""Aggregating blueprints: a table, a consensus or a course, streamed as JSON, NDJSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.requests import ClientDisconnect

from app.api.dependencies import CurrentSettings, Reader
from app.api.problems import documented
from app.api.representations import CSV, JSON, preferred
from app.database import create_engine
from app.registry import aggregation, selection
from app.settings import Settings
from gradient_blueprints.csv_tables import layer_cells, layer_columns
from gradient_blueprints.errors import NotAcceptable, ServiceUnavailable
from gradient_blueprints.models import format_checkpoint
from gradient_blueprints.statistics_models import AggregateResult, Aggregation, Consensus, Course, TableRow

logger = logging.getLogger(__name__)

router = APIRouter(tags=["aggregation"])

NDJSON = "application/x-ndjson"
_MEMBERS = {
    AggregateResult.TABLE: "rows",
    AggregateResult.CONSENSUS: "consensuses",
    AggregateResult.COURSE: "courses",
}
_CHUNK = 1 << 16  # characters gathered before they are sent
_WAIT_SECONDS = 5.0  # for another aggregation to end
_KEYS = ("model_id", "training_checkpoint", "version", "lab", "digest", "collision", "yanked")


def create_engine_of_streams(settings: Settings) -> AsyncEngine:
    """Its connections are held for as long as clients take to read: others must not wait for theirs behind them."""
    return create_engine(
        settings,
        connections=settings.aggregations,
        wait_seconds=_WAIT_SECONDS,
        idle_seconds=settings.aggregation_seconds + settings.body_seconds,  # never before `_in_time` says so
    )


async def _begin_snapshot(session: AsyncSession) -> None:
    """One state of the registry is what the session sees throughout."""
    await session.connection(execution_options={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True})


async def _snapshot(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions() as session:
        await _begin_snapshot(session)
        yield session


async def _streamed_snapshot(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.streaming_sessions() as session:
        try:
            await _begin_snapshot(session)
        except PoolTimeout:
            raise ServiceUnavailable(
                "As many aggregations are under way as this registry makes at a time; try again.",
                retry_after=_WAIT_SECONDS,
            ) from None
        yield session


Snapshot = Annotated[AsyncSession, Depends(_snapshot, scope="function")]
# It lives until the answer has been sent.
StreamedSnapshot = Annotated[AsyncSession, Depends(_streamed_snapshot, scope="request")]


class _Table(BaseModel):
    rows: list[TableRow]


class _Consensuses(BaseModel):
    consensuses: list[Consensus]


class _Courses(BaseModel):
    courses: list[Course]


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": _Table | _Consensuses | _Courses,
        "content": {NDJSON: {"schema": {"type": "string"}}, CSV: {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/aggregate", response_class=StreamingResponse, responses=_RESPONSES | documented(404, 406))
async def aggregate_blueprints(
    request: Request, reader: Reader, settings: CurrentSettings, session: StreamedSnapshot, wanted: Aggregation
) -> StreamingResponse:
    """Combine blueprints: every row, one consensus per checkpoint, or one course per model."""
    accept = ",".join(request.headers.getlist("accept")) or "*/*"
    media_type = preferred(accept, (JSON, NDJSON, CSV))
    if media_type is None:
        raise NotAcceptable(f"An aggregation can be had as {JSON}, {NDJSON} or {CSV}, not as {accept!r}.")
    await selection.check_names(session, wanted)
    if media_type == CSV:
        parts = await _csv(session, wanted)
    else:
        lines = _lines(session, wanted)
        parts = lines_as_json(lines, _MEMBERS[wanted.result]) if media_type == JSON else _terminated(lines)
    shown = f"{CSV}; charset=utf-8" if media_type == CSV else media_type
    chunks = _in_time(_in_chunks(parts), settings.aggregation_seconds)
    return StreamingResponse(chunks, media_type=shown, headers={"Vary": "Accept"})


def _lines(session: AsyncSession, wanted: Aggregation) -> AsyncIterator[str]:
    match wanted.result:
        case AggregateResult.TABLE:
            return aggregation.table_lines(session, wanted)
        case AggregateResult.CONSENSUS:
            return _rendered(aggregation.consensuses(session, wanted))
        case AggregateResult.COURSE:
            return _rendered(aggregation.courses(session, wanted))


async def _rendered(values: AsyncIterator[Consensus] | AsyncIterator[Course]) -> AsyncIterator[str]:
    async for value in values:
        # null within `norms` and `ranks` stays: it stands for a checkpoint without the layer
        yield value.model_dump_json(exclude_none=True)


async def lines_as_json(lines: AsyncIterator[str], member: str) -> AsyncIterator[str]:
    """One JSON object with the lines in an array."""
    separator = f'{{"{member}":['
    async for some in lines:
        yield separator + some.replace("\n", ",")  # JSON texts hold no line feed themselves
        separator = ","
    yield "]}" if separator == "," else separator + "]}"


async def _terminated(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        yield line + "\n"


async def _in_chunks(parts: AsyncIterator[str]) -> AsyncIterator[bytes]:
    held: list[str] = []
    size = 0
    async for part in parts:
        held.append(part)
        size += len(part)
        if size >= _CHUNK:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


async def _in_time(chunks: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """Broken off when they were not taken in time. How long each may take is app.api.gate's business."""
    taken_by = time.monotonic() + seconds
    async for chunk in chunks:
        if time.monotonic() > taken_by:
            logger.warning("a client did not take an aggregation within %g seconds", seconds)
            raise ClientDisconnect
        yield chunk


# --- CSV


async def _csv(session: AsyncSession, wanted: Aggregation) -> AsyncIterator[str]:
    match wanted.result:
        case AggregateResult.TABLE:
            columns = [*_KEYS, *layer_columns(await aggregation.open_columns(session, wanted))]
            return _written(columns, aggregation.table_lines(session, wanted), _table_cells)
        case AggregateResult.CONSENSUS:
            return _written(_CONSENSUS_COLUMNS, aggregation.consensuses(session, wanted), _consensus_cells)
        case AggregateResult.COURSE:
            return _written(_COURSE_COLUMNS, aggregation.courses(session, wanted), _course_cells)


async def _written(
    columns: list[str], values: AsyncIterator[Any], cells: Callable[[Any], Iterable[Mapping[str, object]]]
) -> AsyncIterator[str]:
    """Text of one value after the other; the buffer never holds more than one."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    async for value in values:
        writer.writerows(cells(value))
        yield out.getvalue()
        out.seek(0)
        out.truncate()
    yield out.getvalue()


def _table_cells(lines: str) -> Iterable[Mapping[str, object]]:
    for line in lines.split("\n"):
        row = json.loads(line)
        yield {name: _cell(row.get(name, False)) for name in _KEYS} | layer_cells(row["layer"])


_CONSENSUS_COLUMNS = [
    "model_id",
    "training_checkpoint",
    "id",
    "gradient_norm",
    "rank",
    "labs",
    "rolled_up",
    "spread",
    "i_squared",
    "influence.lab",
    "influence.factor",
    "kind",
    "depth",
    "kendall_w",
    "status",
    "method",
    "method_version",
]


def _consensus_cells(consensus: Consensus) -> Iterable[Mapping[str, object]]:
    """A row a layer; a checkpoint without comparable labs has one row that says so."""
    about = consensus.model_dump(exclude={"layers", "sources"}, exclude_none=True)
    shared = {name: about[name] for name in _CONSENSUS_COLUMNS if name in about}
    shared["training_checkpoint"] = format_checkpoint(consensus.training_checkpoint)
    for layer in consensus.layers or (None,):
        cells = dict(shared)
        if layer is not None:
            held = layer.model_dump(mode="json", exclude={"influence", "domain_tags"}, exclude_none=True)
            cells |= held
            if layer.influence is not None:
                cells["influence.lab"] = layer.influence.lab
                if layer.influence.factor is not None:
                    cells["influence.factor"] = layer.influence.factor
        yield cells


_COURSE_COLUMNS = ["model_id", "id", "training_checkpoint", "gradient_norm", "rank", "rank_change"]


def _course_cells(course: Course) -> Iterable[Mapping[str, object]]:
    for layer in course.layers:
        for checkpoint, norm, rank in zip(course.checkpoints, layer.norms, layer.ranks, strict=True):
            if norm is not None:
                yield {
                    "model_id": course.model_id,
                    "id": layer.id,
                    "training_checkpoint": format_checkpoint(checkpoint),
                    "gradient_norm": norm,
                    "rank": "" if rank is None else rank,
                    "rank_change": "" if layer.rank_change is None else layer.rank_change,
                }


def _cell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
