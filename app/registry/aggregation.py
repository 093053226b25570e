"""Many blueprints as one table, as one consensus per checkpoint, or as one course over training.

Selecting, rolling up, centring and ranking happen in SQL; what comes back is read from a server-side cursor, so that
memory holds a few documents of the table, or one layer's labs and one checkpoint's layers of a consensus.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry.agreement import (
    CONFIDENCE,
    Floats,
    concordance,
    kendall,
    kendall_interval,
    spearman,
    spearman_interval,
)
from app.registry.consensus import combine, ranked
from app.registry.selection import CHOSEN, parameters
from gradient_blueprints.errors import InvalidRequest
from gradient_blueprints.models import LayerKind
from gradient_blueprints.statistics_models import (
    CONSENSUS_METHOD,
    CONSENSUS_METHOD_VERSION,
    Aggregation,
    Consensus,
    ConsensusLayer,
    Course,
    CourseLayer,
    DomainWeight,
    Influence,
    NeighbourAgreement,
    Source,
)

_DOCUMENTS_AT_ONCE = 4
_LAYERS_AT_ONCE = 50  # each holds what every lab says
_MOST_OPEN_COLUMNS = 1_000
_DIGITS = 12  # the last digits of a logarithm differ between mathematical libraries; these do not
_SHOWN_MOVERS = 10

# --- the table

# A row a document: its lines, put together from the text of its entries, which is never taken apart.
TABLE = f"""
WITH {CHOSEN},
collisions AS (
    SELECT checkpoint_id, jsonb_object_agg(layer_id, true) AS layer_ids
    FROM (
        SELECT c.checkpoint_id, l.layer_id
        FROM chosen c JOIN layers l ON l.document_id = c.document_id
        WHERE c.checkpoint_id IN (SELECT checkpoint_id FROM chosen GROUP BY checkpoint_id HAVING count(*) > 1)
        GROUP BY c.checkpoint_id, l.layer_id HAVING count(*) > 1
    ) repeated
    GROUP BY checkpoint_id
)
SELECT lines.joined AS lines
FROM chosen c
JOIN documents d ON d.id = c.document_id
LEFT JOIN collisions x ON x.checkpoint_id = c.checkpoint_id
CROSS JOIN LATERAL (
    SELECT '{{' || '"model_id":' || to_json(c.model_id) || ',"training_checkpoint":' || trim_scale(c.fraction)
        || ',"version":' || c.number || ',"lab":' || to_json(c.lab)
        || ',"digest":"sha256:' || encode(c.digest, 'hex') || '"'
        || CASE WHEN c.yanked THEN ',"yanked":' || c.yanked ELSE '' END || ',"layer":' AS head
) told
CROSS JOIN LATERAL (
    SELECT string_agg(
        told.head || layer.entry || ',"collision":' || coalesce(x.layer_ids ? (layer.entry ->> 'id'), false) || '}}',
        E'\n' ORDER BY layer.position
    ) AS joined
    FROM json_array_elements(convert_from(d.body, 'UTF8')::json -> 'layers') WITH ORDINALITY AS layer (entry, position)
) lines
ORDER BY c.model_id, c.fraction, c.number
"""  # noqa: S608 - put together from constants

_OPEN_COLUMNS = f"""
WITH {CHOSEN}
SELECT DISTINCT keys.name, keys.member
FROM chosen c
JOIN documents d ON d.id = c.document_id
CROSS JOIN LATERAL jsonb_array_elements(convert_from(d.body, 'UTF8')::jsonb -> 'layers') AS layer (entry)
CROSS JOIN LATERAL (
    SELECT 'domain_tags' AS name, jsonb_object_keys(layer.entry -> 'domain_tags') AS member
    UNION ALL SELECT 'domain_norms', jsonb_object_keys(layer.entry -> 'domain_norms')
    UNION ALL SELECT 'retained_mass', pair.value ->> 0
              FROM jsonb_array_elements(layer.entry -> 'retained_mass') AS pair (value)
) AS keys
LIMIT {_MOST_OPEN_COLUMNS + 1}
"""  # noqa: S608 - put together from constants


async def table_lines(session: AsyncSession, wanted: Aggregation) -> AsyncIterator[str]:
    """The rows (TableRow), by model, checkpoint and version, the layers in the order of their document.

    Each value is the lines of one document: JSON texts with a line feed between them, and none within.
    """
    rows = await session.stream(text(TABLE), parameters(wanted), execution_options={"yield_per": _DOCUMENTS_AT_ONCE})
    async for row in rows:
        yield row.lines


async def open_columns(session: AsyncSession, wanted: Aggregation) -> dict[str, list[str]]:
    """The members of domain_tags, domain_norms and retained_mass that occur: the columns of a CSV table."""
    rows = (await session.execute(text(_OPEN_COLUMNS), parameters(wanted))).all()
    if len(rows) > _MOST_OPEN_COLUMNS:
        raise InvalidRequest(
            f"As CSV this table would have more than {_MOST_OPEN_COLUMNS} columns for domains and shares; "
            "take JSON or NDJSON, or fewer blueprints."
        )
    found: dict[str, set[str]] = {"domain_tags": set(), "domain_norms": set(), "retained_mass": set()}
    for name, member in rows:
        found[name].add(repr(float(member)) if name == "retained_mass" else member)
    return {
        name: sorted(members, key=float) if name == "retained_mass" else sorted(members)
        for name, members in found.items()
    }


# --- the consensus

_GROUPS = f"""
WITH {CHOSEN}
SELECT DISTINCT checkpoint_id, model_id, fraction FROM chosen ORDER BY model_id, fraction
"""  # noqa: S608 - put together from constants

_VOICES = """
voices AS MATERIALIZED (
    SELECT DISTINCT ON (lab_id) * FROM chosen ORDER BY lab_id, number DESC
)
"""

# The squares of norms beyond 1e±150 would leave float64; such norms are read as these when parts are put together.
_RELATIVE = f"""
WITH {CHOSEN}, {_VOICES},
reported AS MATERIALIZED (
    SELECT v.lab_id, l.layer_id, l.gradient_norm AS norm, l.gradient_norm_low AS low, l.gradient_norm_high AS high,
           l.parameters, l.kind, l.depth, l.domain_tags, 0 AS parts
    FROM voices v JOIN layers l ON l.document_id = v.document_id
),
ids AS MATERIALIZED (
    SELECT layer_id, string_to_array(layer_id, '.') AS segments,
           array_agg(DISTINCT parameters) FILTER (WHERE parameters IS NOT NULL) AS counts
    FROM reported GROUP BY layer_id
),
pairs AS MATERIALIZED (
    SELECT whole.layer_id AS whole, whole.counts, part.layer_id AS part
    FROM ids part
    CROSS JOIN LATERAL generate_series(1, cardinality(part.segments) - 1) AS cut (length)
    JOIN ids whole ON whole.layer_id = array_to_string(part.segments[1:cut.length], '.')
),
rolled_up AS (
    SELECT r.lab_id, p.whole AS layer_id,
           sqrt(sum(CASE WHEN r.norm = 0 THEN 0 ELSE power(least(greatest(r.norm, 1e-150), 1e150), 2) END)) AS norm,
           NULL::float AS low, NULL::float AS high, NULL::bigint AS parameters,
           CASE WHEN min(r.kind) = max(r.kind) THEN min(r.kind) END AS kind, min(r.depth) AS depth,
           NULL::jsonb AS domain_tags, count(*)::int AS parts
    FROM pairs p JOIN reported r ON r.layer_id = p.part
    WHERE NOT EXISTS (SELECT FROM reported h WHERE h.lab_id = r.lab_id AND h.layer_id = p.whole)
      AND NOT EXISTS (
          SELECT FROM pairs between_them JOIN reported h
            ON h.lab_id = r.lab_id AND h.layer_id = between_them.whole
          WHERE between_them.part = p.part AND length(between_them.whole) > length(p.whole)
      )
    GROUP BY r.lab_id, p.whole, p.counts
    HAVING p.counts IS NULL OR count(r.parameters) < count(*) OR sum(r.parameters) = ANY(p.counts)
),
rows AS MATERIALIZED (SELECT * FROM reported UNION ALL SELECT * FROM rolled_up),
able AS (SELECT lab_id FROM rows GROUP BY lab_id HAVING max(norm) > 0),
core AS MATERIALIZED (
    SELECT layer_id FROM rows JOIN able USING (lab_id)
    GROUP BY layer_id HAVING count(*) * 2 > (SELECT count(*) FROM able)
),
centres AS MATERIALIZED (
    SELECT lab_id, percentile_cont(0.5) WITHIN GROUP (ORDER BY ln(norm)) AS centre
    FROM rows JOIN core USING (layer_id) WHERE norm > 0 GROUP BY lab_id
)
"""  # noqa: S608 - put together from constants

CENTRES = f"""
{_RELATIVE}
SELECT v.lab, v.number, v.digest, c.centre, a.lab_id IS NOT NULL AS able, (SELECT count(*) FROM core) AS core
FROM voices v LEFT JOIN able a USING (lab_id) LEFT JOIN centres c USING (lab_id)
ORDER BY v.lab
"""  # noqa: S608 - put together from constants

LAYERS_OF_A_CHECKPOINT = f"""
{_RELATIVE},
placed AS (
    SELECT r.layer_id, r.lab_id, r.norm, r.low, r.high, r.kind, r.depth, r.parts, c.centre,
           core.layer_id IS NOT NULL AS is_core,
           count(*) OVER (PARTITION BY r.layer_id) = (SELECT count(*) FROM centres) AS complete
    FROM rows r JOIN centres c USING (lab_id) LEFT JOIN core ON core.layer_id = r.layer_id
),
ranked AS (
    SELECT p.*, v.lab,
           rank() OVER among_complete + (count(*) OVER tied_complete - 1) / 2.0::float AS mid_rank,
           count(*) OVER tied_complete AS tied,
           (rank() OVER among_core + (count(*) OVER tied_core - 1) / 2.0::float) / count(*) OVER all_core AS share
    FROM placed p JOIN voices v USING (lab_id)
    WINDOW among_complete AS (PARTITION BY lab_id, complete ORDER BY norm),
           tied_complete AS (PARTITION BY lab_id, complete, norm),
           among_core AS (PARTITION BY lab_id, is_core ORDER BY norm),
           tied_core AS (PARTITION BY lab_id, is_core, norm),
           all_core AS (PARTITION BY lab_id, is_core)
),
weights AS (
    SELECT layer_id, jsonb_object_agg(tag, jsonb_build_array(weight, labs)) AS domain_tags
    FROM (
        SELECT r.layer_id, entry.key AS tag, count(*) AS labs,
               percentile_cont(0.5) WITHIN GROUP (ORDER BY CAST(entry.value AS float)) AS weight
        FROM rows r JOIN centres c USING (lab_id) CROSS JOIN LATERAL jsonb_each_text(r.domain_tags) AS entry
        WHERE CAST(:tags AS text[]) IS NULL OR entry.key = ANY(:tags)
        GROUP BY r.layer_id, entry.key
    ) per_tag
    GROUP BY layer_id
)
SELECT r.layer_id COLLATE "C" AS layer_id, r.is_core, r.complete, w.domain_tags,
       array_agg(r.lab ORDER BY r.lab) AS labs, array_agg(r.norm ORDER BY r.lab) AS norms,
       array_agg(r.centre ORDER BY r.lab) AS centres,
       array_agg(r.low ORDER BY r.lab) AS lows, array_agg(r.high ORDER BY r.lab) AS highs,
       count(*) FILTER (WHERE r.parts > 0) AS rolled_up,
       mode() WITHIN GROUP (ORDER BY r.kind) AS kind, mode() WITHIN GROUP (ORDER BY r.depth) AS depth,
       sum(r.mid_rank) AS rank_sum, sum(r.tied * r.tied - 1) AS ties,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY r.share) AS share
FROM ranked r LEFT JOIN weights w USING (layer_id)
GROUP BY r.layer_id, r.is_core, r.complete, w.domain_tags
ORDER BY 1
"""  # noqa: S608 - put together from constants


async def consensuses(session: AsyncSession, wanted: Aggregation) -> AsyncIterator[Consensus]:
    """One per model and checkpoint, in their order. The session's transaction should see one snapshot throughout."""
    for group in (await session.execute(text(_GROUPS), parameters(wanted))).all():
        yield await _consensus(session, wanted, group)


async def _consensus(session: AsyncSession, wanted: Aggregation, group: Row[Any]) -> Consensus:
    values = parameters(wanted, group.checkpoint_id)
    voices = (await session.execute(text(CENTRES), values)).all()
    centres = {voice.lab: float(voice.centre) for voice in voices if voice.centre is not None}
    scale = float(np.median(list(centres.values()))) if centres else 0.0
    gathered = _Gathered(scale)
    rows = await session.stream(text(LAYERS_OF_A_CHECKPOINT), values, execution_options={"yield_per": _LAYERS_AT_ONCE})
    async for row in rows:
        gathered.add(row)
    return Consensus(
        model_id=group.model_id,
        training_checkpoint=float(group.fraction),
        method=CONSENSUS_METHOD,
        method_version=CONSENSUS_METHOD_VERSION,
        status="not_comparable" if not centres else "consensus" if len(centres) > 1 else "single_lab",
        sources=tuple(
            Source(
                digest=f"sha256:{voice.digest.hex()}",
                lab=voice.lab,
                version=voice.number,
                scale=_power(voice.centre) if voice.lab in centres else None,
                deviation=gathered.deviation(voice.lab),
                left_out=None if voice.lab in centres else "no_common_layers" if voice.able else "no_positive_norm",
            )
            for voice in voices
        ),
        core_layers=voices[0].core,
        complete_layers=len(gathered.rank_sums),
        kendall_w=_rounded(concordance(gathered.rank_sums, len(centres), gathered.ties)),
        scale=_power(scale) if centres else None,
        layers=gathered.layers(),
    )


@dataclass
class _Estimate:
    layer: ConsensusLayer
    share: float | None  # median over the labs of the rank among core layers, as a share of them


class _Gathered:
    """The layers of one checkpoint as they come, and the sums over them."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._estimates: list[_Estimate] = []
        self._deviations: dict[str, tuple[float, int]] = {}
        self.rank_sums: list[float] = []
        self.ties = 0

    def add(self, row: Any) -> None:
        """One layer: what its labs say, by lab."""
        with np.errstate(divide="ignore"):
            logs = np.log(row.norms) - row.centres
        combined = combine(logs, _log_errors(row.lows, row.highs))
        for lab, deviation in zip(row.labs, combined.deviations.tolist(), strict=True):
            if math.isfinite(deviation):
                total, count = self._deviations.get(lab, (0.0, 0))
                self._deviations[lab] = (total + deviation, count + 1)
        if row.complete:
            self.rank_sums.append(float(row.rank_sum))
            self.ties += int(row.ties)  # t members of a group of ties, each t^2 - 1: t^3 - t together
        influence = None
        if combined.influential is not None and combined.without is not None:
            moved = combined.without - combined.log_norm
            factor = _power(moved) if math.isfinite(moved) else None
            influence = Influence(lab=row.labs[combined.influential], factor=factor)
        weights = {
            tag: DomainWeight(weight=_digits(weight), labs=labs)
            for tag, (weight, labs) in sorted((row.domain_tags or {}).items())
        }
        layer = ConsensusLayer(
            id=row.layer_id,
            gradient_norm=_power(combined.log_norm + self._scale),
            labs=len(row.labs),
            rolled_up=row.rolled_up,
            spread=_rounded(combined.spread),
            i_squared=_rounded(combined.i_squared),
            influence=influence,
            domain_tags=weights or None,
            kind=None if row.kind is None else LayerKind(row.kind),
            depth=row.depth,
        )
        self._estimates.append(_Estimate(layer, float(row.share) if row.is_core else None))

    def deviation(self, lab: str) -> float | None:
        total, count = self._deviations.get(lab, (0.0, 0))
        return _rounded(total / count) if count else None

    def layers(self) -> tuple[ConsensusLayer, ...]:
        core = [estimate for estimate in self._estimates if estimate.share is not None]
        ranks = ranked(
            [estimate.share or 0.0 for estimate in core],
            [estimate.layer.gradient_norm for estimate in core],
            [estimate.layer.id for estimate in core],
        )
        rank_of = {estimate.layer.id: rank for estimate, rank in zip(core, ranks, strict=True)}
        return tuple(
            estimate.layer.model_copy(update={"rank": rank_of.get(estimate.layer.id)}) for estimate in self._estimates
        )


def _log_errors(lows: Sequence[float | None], highs: Sequence[float | None]) -> Floats:
    """Standard errors of the logarithms from the labs' intervals; NaN where there is none above 0."""
    low, high = np.array(lows, np.float64), np.array(highs, np.float64)
    usable = low > 0
    return np.log(high, where=usable, out=np.full(len(low), np.nan)) / (2 * _Z) - np.log(
        low, where=usable, out=np.full(len(low), np.nan)
    ) / (2 * _Z)


_Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def _power(log: float) -> float:
    """e^log, at most the largest float64."""
    return 0.0 if log == -math.inf else _digits(math.exp(min(log, 709.0)))


def _rounded(value: float | None) -> float | None:
    return None if value is None else _digits(value)


def _rounded_interval(interval: tuple[float, float]) -> tuple[float, float]:
    return _digits(interval[0]), _digits(interval[1])


def _digits(value: float) -> float:
    """12 significant digits."""
    return float(f"{value:.{_DIGITS}g}")


# --- the course over training


async def courses(session: AsyncSession, wanted: Aggregation) -> AsyncIterator[Course]:
    """One per model, from the consensus of each checkpoint in the order of training."""
    current: list[Consensus] = []
    async for consensus in consensuses(session, wanted):
        if current and current[0].model_id != consensus.model_id:
            yield course_of(current)
            current = []
        current.append(consensus)
    if current:
        yield course_of(current)


def course_of(consensuses: Sequence[Consensus]) -> Course:
    """The course of one model from its consensuses, which are in the order of training."""
    norms = [{layer.id: layer.gradient_norm for layer in consensus.layers} for consensus in consensuses]
    ranks = [
        {layer.id: layer.rank for layer in consensus.layers if layer.rank is not None} for consensus in consensuses
    ]
    layers = []
    for name in sorted({name for norm in norms for name in norm}):
        held = [rank[name] for rank in ranks if name in rank]
        layers.append(
            CourseLayer(
                id=name,
                norms=tuple(norm.get(name) for norm in norms),
                ranks=tuple(rank.get(name) for rank in ranks),
                rank_change=held[0] - held[-1] if len(held) > 1 else None,
            )
        )
    moved = sorted((layer for layer in layers if layer.rank_change), key=lambda layer: (-abs(_change(layer)), layer.id))
    return Course(
        model_id=consensuses[0].model_id,
        checkpoints=tuple(consensus.training_checkpoint for consensus in consensuses),
        method=CONSENSUS_METHOD,
        method_version=CONSENSUS_METHOD_VERSION,
        digests=tuple(
            source.digest for consensus in consensuses for source in consensus.sources if source.left_out is None
        ),
        layers=tuple(layers),
        neighbours=tuple(
            _neighbours(*pair, *between)
            for pair, between in zip(itertools.pairwise(consensuses), itertools.pairwise(norms), strict=True)
        ),
        rising=tuple(layer.id for layer in moved if _change(layer) > 0)[:_SHOWN_MOVERS],
        falling=tuple(layer.id for layer in moved if _change(layer) < 0)[:_SHOWN_MOVERS],
    )


def _change(layer: CourseLayer) -> int:
    return layer.rank_change or 0


def _neighbours(
    earlier: Consensus, later: Consensus, before: dict[str, float], after: dict[str, float]
) -> NeighbourAgreement:
    common = sorted(before.keys() & after.keys())
    x, y = [before[name] for name in common], [after[name] for name in common]
    rho, tau = spearman(x, y), kendall(x, y)
    return NeighbourAgreement(
        from_checkpoint=earlier.training_checkpoint,
        to_checkpoint=later.training_checkpoint,
        layers=len(common),
        spearman=_rounded(rho),
        spearman_ci=None if rho is None else _rounded_interval(spearman_interval(rho, len(common))),
        kendall=_rounded(tau),
        kendall_ci=None if tau is None else _rounded_interval(kendall_interval(tau, len(common))),
    )
