"""Checking whether a published blueprint still holds on local data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import anyio
import numpy as np
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import evidence, tables
from app.registry.agreement import descending, rank_biased_overlap, top_overlap
from app.registry.blueprints import Found, resolve, resolve_digest
from app.registry.callers import Caller
from app.registry.drift import Agreement, Sample, assess, log_errors
from app.registry.grouping import COARSER, groups, parts
from gradient_blueprints.canonical import canonical_bytes, digest_of
from gradient_blueprints.errors import InvalidRequest, Unauthenticated
from gradient_blueprints.statistics_models import (
    DEFAULT_THRESHOLD,
    GENERAL,
    STALENESS_METHOD_VERSION,
    Advice,
    Level,
    LevelAgreement,
    LocalSample,
    Staleness,
    StalenessRequest,
    Verdict,
    plain,
)

_TOP_SHARE = 10  # the top in use is a tenth of the matched layers unless the caller says otherwise
_LEAST_PERSISTENCE = 0.5  # with a top of 1 the overlap would look at nothing but the first


@dataclass(frozen=True)
class Side:
    """One side of a check: its layers in the order of their ids, and what is known of each."""

    ids: list[str]
    sample: Sample
    parameters: dict[str, int | None]
    kinds: list[str | None]
    depths: list[int | None]
    unit: float = 1.0  # of the sample's numbers

    def put_together(self, wholes: Sequence[Sequence[str]]) -> Sample:
        """A value for each of `wholes`: a layer, or the layers that make it up."""
        position = {name: index for index, name in enumerate(self.ids)}
        if all(len(names) == 1 for names in wholes):
            return self.sample.take([position[names[0]] for names in wholes])
        return self.sample.grouped([[position[name] for name in names] for names in wholes])


async def check(
    session: AsyncSession, caller: Caller | None, model_id: str, checkpoint: Decimal, request: StalenessRequest
) -> Staleness:
    """Judge the published blueprint against a local sample or another blueprint, and keep the check on request."""
    if request.keep and caller is None:
        raise Unauthenticated("Keeping a check needs a key, so that each has one voice; without keep none is needed.")
    found = await resolve(session, model_id, checkpoint, lab=request.lab, version=request.version)
    rows = await _rows(session, found.document_id)
    norms = await _norms_of(session, found.document_id, request.domain)
    if request.local is not None:
        statistic = request.local.statistic
        if statistic != "gradient_norm":
            norms = None
        other_digest = digest_of(canonical_bytes(plain(request.local)))
        local = side_of_sample(request.local)
    else:
        assert request.digest is not None, "the request holds one of the two"
        other = await resolve_digest(session, request.digest)
        other_rows = await _rows(session, other.document_id)
        other_norms = None if norms is None else await _norms_of(session, other.document_id, request.domain)
        both_signal = all(row.signal is not None for row in (*rows, *other_rows))
        statistic = "signal" if both_signal and norms is None else "gradient_norm"
        other_digest, local = request.digest, side_of_rows(other_rows, statistic, other_norms)
    published = side_of_rows(rows, statistic, norms)
    if not published.ids:
        raise InvalidRequest(
            f"The published blueprint holds no {statistic}; send the statistic gradient_norm, which all hold."
        )
    domain = GENERAL if norms is None else request.domain

    async def judged(asked: StalenessRequest) -> Staleness:
        return await anyio.to_thread.run_sync(
            judge, found, published, local, asked, statistic, domain, other_digest, abandon_on_cancel=True
        )

    checked = await judged(request)
    if request.keep and caller is not None:
        counted = checked
        if request.threshold != DEFAULT_THRESHOLD:  # evidence is judged by one measure, whoever asked by which
            counted = await judged(request.model_copy(update={"threshold": DEFAULT_THRESHOLD}))
        offered = _norms(local) if request.offer_norms else None
        kept = await evidence.keep(session, caller, found, counted, offered)
        checked = checked.model_copy(update={"kept": kept, "not_kept": None if kept else evidence.ALREADY_TODAY})
    return checked


def _norms(local: Side) -> dict[str, float]:
    return {name: float(value) * local.unit for name, value in zip(local.ids, local.sample.values, strict=True)}


async def _rows(session: AsyncSession, document_id: int) -> Sequence[Any]:
    layer = tables.Layer
    return (
        await session.execute(
            select(
                layer.layer_id,
                layer.gradient_norm,
                layer.gradient_norm_low,
                layer.gradient_norm_high,
                layer.signal,
                layer.example_norm,
                layer.parameters,
                layer.kind,
                layer.depth,
            )
            .where(layer.document_id == document_id)
            .order_by(layer.layer_id)
        )
    ).all()


async def _norms_of(session: AsyncSession, document_id: int, domain: str) -> dict[str, float] | None:
    """The norms of a domain by layer; None unless the document holds them for each, and for the general one."""
    if domain == GENERAL:
        return None
    body: bytes = await session.scalar(select(tables.Document.body).where(tables.Document.id == document_id)) or b""
    layers = (await anyio.to_thread.run_sync(lambda: json.loads(body)))["layers"]
    norms: dict[str, Any] = {layer["id"]: (layer.get("domain_norms") or {}).get(domain) for layer in layers}
    return norms if all(norm is not None for norm in norms.values()) else None


def side_of_rows(rows: Sequence[Any], statistic: str, norms: Mapping[str, float] | None = None) -> Side:
    """A stored blueprint, by the statistic; layers that lack it are left out. Intervals are those of gradient_norm.

    With `norms`, those of a domain by layer, these stand in its place; they have no intervals.
    """
    if norms is not None:
        held = sorted(rows, key=lambda row: str(row.layer_id))
        return _side_of(held, Sample(np.array([norms[row.layer_id] for row in held], np.float64)))
    held = sorted((row for row in rows if getattr(row, statistic) is not None), key=lambda row: str(row.layer_id))
    errors = None
    if statistic == "gradient_norm" and held:
        errors = log_errors(
            [math.nan if row.gradient_norm_low is None else row.gradient_norm_low for row in held],
            [math.nan if row.gradient_norm_high is None else row.gradient_norm_high for row in held],
        )
    return _side_of(held, Sample(np.array([getattr(row, statistic) for row in held], np.float64), log_error=errors))


def _side_of(held: Sequence[Any], sample: Sample) -> Side:
    return Side(
        ids=[row.layer_id for row in held],
        sample=sample,
        parameters={row.layer_id: row.parameters for row in held},
        kinds=[row.kind for row in held],
        depths=[row.depth for row in held],
    )


def side_of_sample(local: LocalSample) -> Side:
    """A local sample. A value beside batches is the estimate; by what share of their mean these vary is its noise."""
    layers = sorted(local.layers, key=lambda layer: layer.id)
    tables_of_batches = [layer.batches for layer in layers if layer.batches is not None]
    unit = 1.0
    if tables_of_batches:
        batches = np.array(tables_of_batches, np.float64).T
        largest = max(batches.max(), *(layer.value or 0.0 for layer in layers))
        # The unit is no matter to ranks; without it sums of huge values would leave float64. A power of 2 is exact.
        unit = 2.0 ** (math.frexp(largest)[1] - 1)
        batches /= unit
        given = [math.nan if layer.value is None else layer.value / unit for layer in layers]
        sample = Sample.of_batches(batches, None if np.isnan(given).all() else given)
    else:
        intervals = [layer.interval or (math.nan, math.nan) for layer in layers]
        values = np.array([layer.value for layer in layers], np.float64)
        errors = log_errors([low for low, _ in intervals], [high for _, high in intervals])
        sample = Sample(values, log_error=errors)
    return Side(
        ids=[layer.id for layer in layers],
        sample=sample,
        parameters={layer.id: layer.parameters for layer in layers},
        kinds=[None] * len(layers),
        depths=[None] * len(layers),
        unit=unit,
    )


@dataclass(frozen=True)
class Matched:
    """The layers that both sides have, some of them put together from finer ones."""

    names: list[str]
    published: Sample
    local: Sample
    kinds: list[str | None]
    depths: list[int | None]
    rolled_up: list[str]
    only_published: list[str]
    only_local: list[str]
    share: float  # of the published layers


def match(published: Side, local: Side) -> Matched:
    """Pair layers by id; where one side lacks a layer and has its parts, the parts stand for it.

    With attn.0 against attn.0.q and attn.0.k the pair is attn.0, whichever side is the finer. 0 layers in common give
    an empty match.
    """
    theirs, ours = published.parameters, local.parameters
    pairs = {name: ([name], [name]) for name in theirs if name in ours}
    of_local = parts({name: theirs[name] for name in theirs if name not in ours}, ours)
    of_published = parts({name: ours[name] for name in ours if name not in theirs}, theirs)
    # A layer that is in both by itself is not also a part of another pair.
    for whole, names in of_local.items():
        if not any(name in pairs for name in names):
            pairs[whole] = ([whole], names)
    for whole, names in of_published.items():
        if not any(name in pairs for name in names):
            pairs[whole] = (names, [whole])
    used_published = {name for left, _ in pairs.values() for name in left}
    used_local = {name for _, right in pairs.values() for name in right}
    names = sorted(pairs)
    place = {name: index for index, name in enumerate(published.ids)}
    positions = [place[pairs[name][0][0]] for name in names]
    return Matched(
        names=names,
        published=published.put_together([pairs[name][0] for name in names]),
        local=local.put_together([pairs[name][1] for name in names]),
        kinds=[published.kinds[index] for index in positions],
        depths=[published.depths[index] for index in positions],
        rolled_up=[name for name in names if pairs[name] != ([name], [name])],
        only_published=[name for name in published.ids if name not in used_published],
        only_local=[name for name in local.ids if name not in used_local],
        share=len(used_published) / len(theirs),
    )


def judge(
    found: Found,
    published: Side,
    local: Side,
    request: StalenessRequest,
    statistic: str,
    published_domain: str,
    other_digest: str,
) -> Staleness:
    """The whole answer; the same blueprint, sample and threshold give the same numbers for ever."""
    matched = match(published, local)
    seed = int.from_bytes(hashlib.sha256(f"{found.digest_text} {other_digest}".encode()).digest()[:8])
    threshold = request.threshold
    n = len(matched.names)
    at_layers = assess(matched.published, matched.local, threshold=threshold, seed=seed, matched_share=matched.share)
    levels = [_level(Level.LAYER, at_layers)]
    holding: Level | None = Level.LAYER if at_layers.verdict is Verdict.FRESH else None
    members: dict[str, tuple[str, ...]] | None = None
    for level in COARSER if holding is None and n else ():
        grouped = groups(level, matched.names, matched.kinds, matched.depths)
        together = list(grouped.values())
        agreement = assess(
            matched.published.grouped(together),
            matched.local.grouped(together),
            threshold=threshold,
            seed=seed,
            matched_share=matched.share,
        )
        levels.append(_level(level, agreement))
        if agreement.verdict is Verdict.FRESH and holding is None:
            holding = level
            members = {name: tuple(matched.names[i] for i in positions) for name, positions in grouped.items()}
    top = min(request.top or max(1, n // _TOP_SHARE), max(n, 1))
    persistence = max(_LEAST_PERSISTENCE, 1 - 1 / top)
    first, second = (descending(side.values, matched.names) for side in (matched.published, matched.local))
    return Staleness(
        model_id=found.model_id,
        training_checkpoint=float(found.checkpoint),
        version=found.version,
        lab=found.lab,
        digest=found.digest_text,
        other_digest=other_digest,
        statistic=statistic,
        domain=request.domain,
        published_domain=published_domain,
        verdict=at_layers.verdict,
        advice=_advice(at_layers.verdict, holding),
        level=holding,
        threshold=threshold,
        levels=tuple(levels),
        top=top,
        top_overlap=top_overlap(first, second, top) if n else None,
        top_by_chance=top / n if n else None,
        rank_biased_overlap=_rounded(rank_biased_overlap(first, second, persistence)) if n else None,
        persistence=persistence,
        matched=n,
        rolled_up=tuple(matched.rolled_up),
        only_published=tuple(matched.only_published),
        only_local=tuple(matched.only_local),
        groups=members,
        method_version=STALENESS_METHOD_VERSION,
    )


def _advice(verdict: Verdict, holding: Level | None) -> Advice:
    if holding is Level.LAYER:
        return Advice.USE
    if holding is not None:
        return Advice.COARSEN
    return Advice.REFRESH if verdict is Verdict.STALE else Advice.MEASURE


def _level(level: Level, agreement: Agreement) -> LevelAgreement:
    return LevelAgreement(
        level=level,
        n=agreement.layers,
        verdict=agreement.verdict,
        reasons=agreement.reasons,
        spearman=_rounded(agreement.rho),
        spearman_ci=_pair(agreement.rho_interval),
        kendall=_rounded(agreement.tau),
        kendall_ci=_pair(agreement.tau_interval),
        ceiling=_rounded(agreement.ceiling),
        corrected=_rounded(agreement.corrected),
        corrected_ci=_pair(agreement.corrected_interval),
        interval_method=str(agreement.method),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _pair(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (round(interval[0], 6), round(interval[1], 6))
