"""Checks that adapters let the registry keep, and what they say together about a blueprint."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from sqlalchemy import Date, Numeric, cast, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, catalog, jobs, paging, tables, webhooks
from app.registry.blueprints import Found, digest_bytes, explain_miss, version_path
from app.registry.callers import Caller
from gradient_blueprints.errors import JobNotFound
from gradient_blueprints.models import Job, JobState, NewJob
from gradient_blueprints.statistics_models import (
    DomainEvidence,
    Evidence,
    EvidencePage,
    EvidenceSummary,
    Level,
    Staleness,
    StalenessEvent,
    Verdict,
)
from gradient_blueprints.webhook_models import WebhookEvent

WINDOW_DAYS = 90
"""Days for which a verdict counts."""
STALE_LIMIT = 0.5
"""Share of stale verdicts at which the alarm is raised."""
FEWEST_USERS = 3
"""Users with a verdict, fresh or stale, below which no share raises an alarm."""
ALREADY_TODAY = "this key has kept a check of this blueprint and domain today; one voice a day counts"
_DIGITS = 2  # evidence is coarse on purpose: it tells how a blueprint fares, not what the adapter's data are
_SHOWN_EVENTS = 100


async def keep(
    session: AsyncSession, caller: Caller, found: Found, checked: Staleness, norms: dict[str, float] | None
) -> bool:
    """Keep a check; False when this key had its say on this blueprint, domain and day.

    The document's row is locked, so that of checks at once each sees the others' and the limit is crossed once.
    """
    checkpoint_id = await session.scalar(
        select(tables.Document.checkpoint_id).where(tables.Document.id == found.document_id).with_for_update()
    )
    agreement = checked.agreement
    kept = await session.scalar(
        insert(tables.Evidence)
        .values(
            checkpoint_id=checkpoint_id,
            document_id=found.document_id,
            key_id=caller.key_id,
            domain=checked.domain,
            verdict=checked.verdict,
            level=checked.level,
            threshold=checked.threshold,
            layers=checked.matched,
            spearman=_coarse(agreement.spearman),
            corrected=_coarse(agreement.corrected),
            ceiling=_coarse(agreement.ceiling),
            top_overlap=_coarse(checked.top_overlap),
            norms=norms,
        )
        .on_conflict_do_nothing()
        .returning(tables.Evidence.id)
    )
    if kept is None:
        return False
    place = version_path(found.model_id, found.checkpoint, found.version)
    await audit.record(session, caller, "evidence.keep", place, domain=checked.domain, verdict=checked.verdict)
    await _watch_limit(session, caller, found, checkpoint_id, checked.domain)
    return True


def _coarse(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


# Of each key its latest word counts; indeterminate is no word on the share.
_LATEST = """
SELECT DISTINCT ON (e.document_id, e.domain, e.key_id) e.checkpoint_id, e.document_id, e.domain, e.verdict, e.day
FROM evidence e
WHERE e.day > CURRENT_DATE - CAST(:window AS integer) AND {}
ORDER BY e.document_id, e.domain, e.key_id, e.id DESC
"""
_SHARE = f"""
SELECT count(*) AS users,
       count(*) FILTER (WHERE verdict = 'fresh') AS fresh, count(*) FILTER (WHERE verdict = 'stale') AS stale
FROM ({_LATEST.format("e.document_id = :document_id AND e.domain = :domain")}) latest
"""  # noqa: S608 - put together from constants
_SUMMARY = f"""
SELECT c.fraction, d.digest, v.number, lab.name AS lab, latest.domain, count(*) AS users, max(latest.day) AS last_day,
       count(*) FILTER (WHERE verdict = 'fresh') AS fresh, count(*) FILTER (WHERE verdict = 'stale') AS stale,
       (SELECT e.kind FROM staleness_events e
        WHERE e.document_id = latest.document_id AND e.domain = latest.domain ORDER BY e.id DESC LIMIT 1) AS last_event
FROM ({_LATEST.format("e.checkpoint_id IN (SELECT id FROM checkpoints WHERE model_id = :model)")}) latest
JOIN checkpoints c ON c.id = latest.checkpoint_id
JOIN documents d ON d.id = latest.document_id
JOIN LATERAL (
    SELECT number, lab_id FROM versions WHERE document_id = latest.document_id ORDER BY number LIMIT 1
) v ON true
JOIN labs lab ON lab.id = v.lab_id
GROUP BY c.fraction, d.digest, v.number, lab.name, latest.domain, latest.document_id
ORDER BY c.fraction, v.number, latest.domain
"""  # noqa: S608 - put together from constants


async def _watch_limit(
    session: AsyncSession, caller: Caller, found: Found, checkpoint_id: int | None, domain: str
) -> None:
    """Write an event when the share of stale verdicts has crossed the limit with this check, either way.

    It takes a few users to raise the alarm, and a share below the limit to clear it: that some of them can no longer
    tell does not.
    """
    row = (
        await session.execute(text(_SHARE), {"window": WINDOW_DAYS, "document_id": found.document_id, "domain": domain})
    ).one()
    share = _share(row)
    last = await session.scalar(
        select(tables.StalenessEvent.kind)
        .where(tables.StalenessEvent.document_id == found.document_id, tables.StalenessEvent.domain == domain)
        .order_by(tables.StalenessEvent.id.desc())
        .limit(1)
    )
    told = row.fresh + row.stale
    raised = last == "raised"
    crossed = told > 0 and share < STALE_LIMIT if raised else told >= FEWEST_USERS and share >= STALE_LIMIT
    if not crossed:
        return
    kind = "cleared" if raised else "raised"
    await session.execute(
        insert(tables.StalenessEvent).values(
            kind=kind,
            checkpoint_id=checkpoint_id,
            document_id=found.document_id,
            domain=domain,
            stale_share=share,
            users=row.users,
        )
    )
    place = version_path(found.model_id, found.checkpoint, found.version)
    await audit.record(session, caller, f"staleness.{kind}", place, domain=domain, stale_share=share, users=row.users)
    if kind == "raised":
        event = {
            "training_checkpoint": float(found.checkpoint),
            "version": found.version,
            "digest": found.digest_text,
            "lab": found.lab,
            "domain": domain,
            "stale_share": share,
            "users": row.users,
        }
        await webhooks.announce(session, WebhookEvent.EVIDENCE_STALE, found.model_id, event)


def _share(row: Any) -> float:
    told = row.fresh + row.stale
    return row.stale / told if told else 0.0


# --- reading


async def list_evidence(
    session: AsyncSession,
    model_id: str,
    checkpoint: Decimal,
    *,
    digest: str | None,
    domain: str | None,
    limit: int,
    cursor: str | None,
) -> EvidencePage:
    """Newest first; whose checks they were is not told."""
    await catalog.get_model(session, model_id)
    place = await session.scalar(
        select(tables.Checkpoint.id)
        .join(tables.Model)
        .where(tables.Model.name == model_id, tables.Checkpoint.fraction == checkpoint)
    )
    if place is None:
        raise await explain_miss(session, model_id, checkpoint)
    query = (
        select(tables.Evidence, tables.Document.digest)
        .join(tables.Document, tables.Document.id == tables.Evidence.document_id)
        .where(tables.Evidence.checkpoint_id == place)
    )
    if digest is not None:
        query = query.where(tables.Document.digest == digest_bytes(digest))
    if domain is not None:
        query = query.where(tables.Evidence.domain == domain)
    if (after := paging.decode_cursor(cursor, int)) is not None:
        query = query.where(tables.Evidence.id < after[0])
    rows = (await session.execute(query.order_by(tables.Evidence.id.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row[0].id,))
    evidence = tuple(
        Evidence(
            day=row.day,
            training_checkpoint=float(checkpoint),
            digest=f"sha256:{stored.hex()}",
            domain=row.domain,
            verdict=Verdict(row.verdict),
            level=None if row.level is None else Level(row.level),
            threshold=row.threshold,
            n=row.layers,
            spearman=row.spearman,
            corrected=row.corrected,
            ceiling=row.ceiling,
            top_overlap=row.top_overlap,
            norms=row.norms,
        )
        for row, stored in page
    )
    return EvidencePage(evidence=evidence, next=following)


async def summarize(session: AsyncSession, model_id: str) -> EvidenceSummary:
    """Per blueprint and domain: how many users found it fresh or stale of late, and when that crossed the limit."""
    await catalog.get_model(session, model_id)
    model = await session.scalar(select(tables.Model.id).where(tables.Model.name == model_id))
    rows = await session.execute(text(_SUMMARY), {"window": WINDOW_DAYS, "model": model})
    domains = tuple(
        DomainEvidence(
            training_checkpoint=float(row.fraction),
            digest=f"sha256:{row.digest.hex()}",
            version=row.number,
            lab=row.lab,
            domain=row.domain,
            users=row.users,
            fresh=row.fresh,
            stale=row.stale,
            indeterminate=row.users - row.fresh - row.stale,
            stale_share=_share(row),
            alarm=row.last_event == "raised",
            last_day=row.last_day,
        )
        for row in rows
    )
    events = await session.execute(
        select(tables.StalenessEvent, tables.Checkpoint.fraction, tables.Document.digest)
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.StalenessEvent.checkpoint_id)
        .join(tables.Document, tables.Document.id == tables.StalenessEvent.document_id)
        .where(tables.Checkpoint.model_id == model)
        .order_by(tables.StalenessEvent.id.desc())
        .limit(_SHOWN_EVENTS)
    )
    return EvidenceSummary(
        model_id=model_id,
        window_days=WINDOW_DAYS,
        limit=STALE_LIMIT,
        fewest_users=FEWEST_USERS,
        domains=domains,
        events=tuple(
            StalenessEvent(
                id=event.id,
                at=event.at,
                kind=event.kind,
                training_checkpoint=float(fraction),
                digest=f"sha256:{digest.hex()}",
                domain=event.domain,
                stale_share=event.stale_share,
                users=event.users,
            )
            for event, fraction, digest in events
        ),
    )


@dataclass(frozen=True)
class Week:
    """The kept checks of one week, by verdict."""

    monday: date
    fresh: int
    stale: int
    indeterminate: int


async def count_by_week(session: AsyncSession, model_id: str, *, weeks: int) -> list[Week]:
    """The last `weeks` weeks that have checks of any blueprint of the model, oldest first."""
    monday = cast(func.date_trunc("week", tables.Evidence.day), Date)
    counts = [func.count().filter(tables.Evidence.verdict == verdict).label(verdict) for verdict in Verdict]
    query = (
        select(monday.label("monday"), *counts)
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.Evidence.checkpoint_id)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .where(tables.Model.name == model_id)
        .group_by(monday)
        .order_by(monday.desc())
        .limit(weeks)
    )
    rows = (await session.execute(query)).all()
    return [Week(row.monday, row.fresh, row.stale, row.indeterminate) for row in reversed(rows)]


async def count_events(session: AsyncSession, model_id: str, *, since: date) -> int:
    """Alarms of any blueprint of the model that were raised or cleared from that day on."""
    query = (
        select(func.count(tables.StalenessEvent.id))
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.StalenessEvent.checkpoint_id)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .where(tables.Model.name == model_id, tables.StalenessEvent.at >= since)
    )
    return (await session.execute(query)).scalar_one()


# --- acting on it


async def refresh(
    session: AsyncSession, caller: Caller, model_id: str, checkpoint: Decimal, *, max_attempts: int
) -> Job:
    """Profile the checkpoint anew: the caller's lab's last job on it that succeeded, submitted again."""
    request = tables.Job.request
    earlier = await session.scalar(
        select(request)
        .where(
            tables.Job.lab_id == caller.lab_id,
            tables.Job.state == JobState.SUCCEEDED,
            request["model_id"].astext == model_id,
            cast(request["training_checkpoint"].astext, Numeric(5, 4)) == checkpoint,
        )
        .order_by(tables.Job.id.desc())
        .limit(1)
    )
    if earlier is None:
        raise JobNotFound(
            f"No job of {caller.lab} on {model_id} at {checkpoint.normalize():f} has succeeded that could be repeated; "
            "submit one with POST /v1/jobs."
        )
    return await jobs.submit_job(session, caller, NewJob.model_validate(earlier), max_attempts=max_attempts)
