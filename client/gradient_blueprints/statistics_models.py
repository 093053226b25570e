"""The wire types of aggregation and staleness."""

from __future__ import annotations

from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gradient_blueprints.models import (
    MAX_LAYERS,
    Blueprint,
    Checkpoint,
    Count,
    Digest,
    Interval,
    LabName,
    Layer,
    LayerId,
    LayerKind,
    ModelId,
    NonNegative,
    Page,
    Provenance,
    Tag,
    Wire,
)

CONSENSUS_METHOD = "weighted-median-of-centred-logs"
CONSENSUS_METHOD_VERSION = 1
STALENESS_METHOD_VERSION = 1
GENERAL = "general"
"""The domain of a blueprint's own statistics, beside its `domain_norms`."""
DEFAULT_THRESHOLD = 0.95
"""A blueprint holds while its ranks follow the local ones at least this well, measurement noise taken out."""
MAX_BATCHES = 1_024

# --- aggregation


class AggregateResult(StrEnum):
    TABLE = "table"
    CONSENSUS = "consensus"
    COURSE = "course"


class Criteria(Wire):
    """What narrows an aggregation, and may be asked of a file too: models AND checkpoints AND tags."""

    models: Annotated[tuple[ModelId, ...], Field(max_length=1_000)] = ()
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(max_length=1_000)] = ()
    from_checkpoint: Checkpoint | None = Field(None, description="at this checkpoint or later")
    to_checkpoint: Checkpoint | None = Field(None, description="at this checkpoint or earlier")
    tags: Annotated[tuple[Tag, ...], Field(max_length=100)] = Field(
        (), description="only blueprints with a weight for one of these domains"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.from_checkpoint, self.to_checkpoint
        if low is not None and high is not None and low > high:
            raise PydanticCustomError("interval_order", "from_checkpoint lies after to_checkpoint")
        return self

    def hold_for(self, blueprint: Blueprint) -> bool:
        """Whether the registry would take it, were it there."""
        low, high, checkpoint = self.from_checkpoint, self.to_checkpoint, blueprint.training_checkpoint
        return (
            (not self.models or blueprint.model_id in self.models)
            and (not self.checkpoints or checkpoint in self.checkpoints)
            and (low is None or checkpoint >= low)
            and (high is None or checkpoint <= high)
            and (
                not self.tags
                or any(tag in (layer.domain_tags or ()) for layer in blueprint.layers for tag in self.tags)
            )
        )


class Aggregation(Criteria):
    """Which blueprints, and what to make of them. At least one of models, labs and digests is named.

    The criteria narrow each other: models AND checkpoints AND labs AND tags; `digests` are added to what they find.
    """

    result: AggregateResult = AggregateResult.TABLE
    versions: Literal["newest", "all"] | tuple[Annotated[int, Field(strict=True, ge=1, lt=2**31)], ...] = Field(
        "newest", description="each lab's newest that is not yanked, all that are not yanked, or these numbers"
    )
    labs: Annotated[tuple[LabName, ...], Field(max_length=1_000)] = ()
    digests: Annotated[tuple[Digest, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.models or self.labs or self.digests):
            raise PydanticCustomError("empty_selection", "name at least one of models, labs and digests")
        return self


class TableRow(Wire):
    """One layer of one blueprint. `collision`: another row has the same model, checkpoint and layer id."""

    model_id: ModelId
    training_checkpoint: Checkpoint
    layer: Layer
    collision: bool
    digest: Digest
    version: int | None = Field(None, description="absent for a file that was not published")
    lab: LabName | None = None
    yanked: bool = False

    @property
    def key(self) -> tuple[str, float, str]:
        """The key of the paper's Appendix A.2."""
        return self.model_id, self.training_checkpoint, self.layer.id


class Source(Wire):
    """A blueprint with a voice in a consensus."""

    digest: Digest
    lab: LabName
    version: int
    scale: float | None = Field(None, description="median norm over the core layers, divided out; absent when left out")
    deviation: float | None = Field(
        None, description="mean distance, in log units, from the consensus of the other labs"
    )
    left_out: Literal["no_positive_norm", "no_common_layers"] | None = None


class Influence(Wire):
    """The lab without which the estimate would move most, and to what multiple of itself."""

    lab: LabName
    factor: float | None = Field(None, description="estimate without this lab / estimate; absent when one of them is 0")


class DomainWeight(Wire):
    weight: NonNegative
    labs: int


class ConsensusLayer(Wire):
    id: LayerId
    gradient_norm: NonNegative
    rank: int | None = Field(None, description="1 is the largest; absent outside the core")
    labs: int
    rolled_up: int = Field(0, description="labs whose value was put together from finer layers")
    spread: float | None = Field(None, description="1.4826 * MAD of the logs of the labs, scales taken out")
    i_squared: float | None = Field(
        None, description="share of the labs' variance that their intervals do not explain (Higgins and Thompson)"
    )
    influence: Influence | None = None
    domain_tags: dict[Tag, DomainWeight] | None = None
    kind: LayerKind | None = None
    depth: int | None = None


class Consensus(Wire):
    """What the labs say together about one model at one checkpoint."""

    model_id: ModelId
    training_checkpoint: Checkpoint
    method: str
    method_version: int
    status: Literal["consensus", "single_lab", "not_comparable"]
    sources: tuple[Source, ...]
    core_layers: int = Field(description="layers that more than half of the labs report")
    complete_layers: int = Field(description="layers that every lab with a voice reports")
    kendall_w: float | None = Field(None, description="agreement of the rankings, over the complete layers")
    scale: float | None = Field(None, description="median of the labs' scales, put back on the estimates")
    layers: tuple[ConsensusLayer, ...]

    def to_blueprint(self) -> Blueprint:
        """The consensus as a blueprint whose provenance names its sources."""
        layers = tuple(
            Layer(
                id=layer.id,
                gradient_norm=layer.gradient_norm,
                kind=layer.kind,
                depth=layer.depth,
                domain_tags={tag: given.weight for tag, given in layer.domain_tags.items()}
                if layer.domain_tags
                else None,
            )
            for layer in self.layers
        )
        sources = tuple(source.digest for source in self.sources if source.left_out is None)
        return Blueprint(
            model_id=self.model_id,
            training_checkpoint=self.training_checkpoint,
            layers=layers,
            provenance=Provenance(
                profiler=f"gradient-blueprints consensus: {self.method} {self.method_version}", sources=sources
            ),
        )


class CourseLayer(Wire):
    id: LayerId
    norms: tuple[float | None, ...] = Field(description="one per checkpoint; null where the layer is missing")
    ranks: tuple[int | None, ...]
    rank_change: int | None = Field(None, description="ranks gained from its first to its last checkpoint")


class NeighbourAgreement(Wire):
    from_checkpoint: Checkpoint
    to_checkpoint: Checkpoint
    layers: int
    spearman: float | None = None
    spearman_ci: Interval | None = None
    kendall: float | None = None
    kendall_ci: Interval | None = None


class Course(Wire):
    """One model over training: each layer's consensus norm and rank from checkpoint to checkpoint."""

    model_id: ModelId
    checkpoints: tuple[Checkpoint, ...]
    method: str
    method_version: int
    digests: tuple[Digest, ...]
    layers: tuple[CourseLayer, ...]
    neighbours: tuple[NeighbourAgreement, ...]
    rising: tuple[LayerId, ...] = Field(description="the layers that gained most ranks, at most 10")
    falling: tuple[LayerId, ...] = Field(description="the layers that lost most ranks, at most 10")


# --- staleness


class Verdict(StrEnum):
    FRESH = "fresh"
    STALE = "stale"
    INDETERMINATE = "indeterminate"


class Level(StrEnum):
    """What is ranked, from the finest to the coarsest."""

    LAYER = "layer"
    KIND_IN_DEPTH_BAND = "kind_in_depth_band"
    KIND = "kind"
    DEPTH_BAND = "depth_band"


class Advice(StrEnum):
    USE = "use"
    COARSEN = "coarsen"
    REFRESH = "refresh"
    MEASURE = "measure"


class LocalLayer(Wire):
    """One layer of a local sample: per batch where it can be had, else one number."""

    id: LayerId
    batches: Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=MAX_BATCHES)] | None = Field(
        None, description="one value a batch, the batches in the same order in every layer"
    )
    value: NonNegative | None = Field(None, description="the value over the whole sample; else the batches' mean")
    interval: Interval | None = Field(None, description="95 % interval of `value`, when there are no batches")
    parameters: Count | None = None

    @model_validator(mode="after")
    def _has_a_value(self) -> Self:
        if self.batches is None and self.value is None:
            raise PydanticCustomError("no_value", "give batches or value")
        return self


class LocalSample(Wire):
    statistic: Literal["signal", "gradient_norm", "example_norm"] = "gradient_norm"
    layers: Annotated[tuple[LocalLayer, ...], Field(min_length=1, max_length=MAX_LAYERS)]

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        if len({layer.id for layer in self.layers}) < len(self.layers):
            raise PydanticCustomError("duplicate_layer", "every layer id must be unique")
        lengths = {0 if layer.batches is None else len(layer.batches) for layer in self.layers}
        if len(lengths) > 1:
            raise PydanticCustomError("ragged_batches", "every layer has the same number of batches, or none has any")
        return self


class StalenessRequest(Wire):
    """What to compare the published blueprint with: a local sample, or another blueprint by digest."""

    local: LocalSample | None = None
    digest: Digest | None = None
    version: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = Field(
        None, description="of the published blueprint; else the owner's newest"
    )
    lab: LabName | None = None
    threshold: Annotated[float, Field(strict=True, gt=0, lt=1)] = DEFAULT_THRESHOLD
    top: Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)] | None = Field(
        None, description="size of the top in use; else a tenth of the matched layers"
    )
    domain: Tag = Field(
        GENERAL,
        description="what the local data are: the published norms of that domain are compared, where the blueprint "
        "holds them for every layer; evidence is counted per domain",
    )
    keep: bool = Field(
        False,
        strict=True,
        description="consent: keep this check, in coarse numbers and judged at the default threshold, as evidence "
        "(needs a key)",
    )
    offer_norms: bool = Field(False, strict=True, description="consent: keep the local values too")

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if (self.local is None) == (self.digest is None):
            raise PydanticCustomError("one_of", "give either local or digest")
        if self.offer_norms and not self.keep:
            raise PydanticCustomError("no_consent", "offer_norms goes with keep")
        if self.offer_norms and self.local is None:
            raise PydanticCustomError("no_norms", "offer_norms goes with local")
        return self


class LevelAgreement(Wire):
    """The agreement at one level, judged."""

    level: Level
    n: int = Field(description="layers, or groups of them")
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    spearman: float | None = None
    spearman_ci: Interval | None = None
    kendall: float | None = None
    kendall_ci: Interval | None = None
    ceiling: float | None = Field(None, description="largest correlation to be expected; absent when unknown")
    corrected: float | None = Field(None, description="spearman / ceiling, at most 1")
    corrected_ci: Interval | None = Field(None, description="what the verdict is read off")
    interval_method: str


class Staleness(Wire):
    """Whether a blueprint still holds on local data."""

    model_id: ModelId
    training_checkpoint: Checkpoint
    version: int
    lab: LabName
    digest: Digest
    other_digest: Digest = Field(description="of the other blueprint, or of the canonical bytes of the local sample")
    statistic: str
    domain: Tag
    published_domain: Tag = Field(
        GENERAL, description="of which the published values are: `domain`, or general for the blueprint's own statistic"
    )
    verdict: Verdict
    advice: Advice
    level: Level | None = Field(None, description="the finest level at which it holds; absent when none does")
    threshold: float
    levels: tuple[LevelAgreement, ...]
    top: int
    top_overlap: float | None = None
    top_by_chance: float | None = None
    rank_biased_overlap: float | None = None
    persistence: float | None = Field(None, description="p of the rank-biased overlap, 1 - 1/top, at least 0.5")
    matched: int
    rolled_up: tuple[LayerId, ...] = Field((), description="matched after putting finer layers together")
    only_published: tuple[LayerId, ...] = ()
    only_local: tuple[LayerId, ...] = ()
    groups: dict[str, tuple[LayerId, ...]] | None = Field(None, description="the layers of each group at `level`")
    method_version: int
    kept: bool = False
    not_kept: str | None = Field(None, description="why a check that should be kept was not")

    @property
    def agreement(self) -> LevelAgreement:
        """That of the single layers."""
        return self.levels[0]


class Evidence(Wire):
    """A check that an adapter let the registry keep: coarse numbers, nobody's name."""

    day: date
    training_checkpoint: Checkpoint
    digest: Digest
    domain: Tag
    verdict: Verdict
    level: Level | None = None
    threshold: float
    n: int
    spearman: float | None = None
    corrected: float | None = None
    ceiling: float | None = None
    top_overlap: float | None = None
    norms: dict[str, float] | None = Field(None, description="only where they were offered")


class EvidencePage(Page):
    evidence: tuple[Evidence, ...]


class DomainEvidence(Wire):
    """How a blueprint fares in one domain: of each key its latest word within the window counts."""

    training_checkpoint: Checkpoint
    digest: Digest
    version: int
    lab: LabName
    domain: Tag
    users: int
    fresh: int
    stale: int
    indeterminate: int
    stale_share: float = Field(description="stale / (fresh + stale); 0 when nobody could tell")
    alarm: bool = Field(description="the share has crossed the limit and not fallen below it since")
    last_day: date


class StalenessEvent(Wire):
    """The share of stale verdicts crossed the limit, upwards (raised) or downwards (cleared)."""

    id: int
    at: datetime
    kind: Literal["raised", "cleared"]
    training_checkpoint: Checkpoint
    digest: Digest
    domain: Tag
    stale_share: float
    users: int


class EvidenceSummary(Wire):
    model_id: ModelId
    window_days: int
    limit: float = Field(description="share of stale verdicts that raises the alarm")
    fewest_users: int = Field(description="users with a verdict below which there is no alarm")
    domains: tuple[DomainEvidence, ...]
    events: tuple[StalenessEvent, ...] = Field(description="newest first, at most 100")


def plain(value: Wire) -> dict[str, Any]:
    """JSON data without what was not given."""
    return value.model_dump(mode="json", exclude_none=True)
