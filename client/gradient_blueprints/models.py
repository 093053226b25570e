"""The wire types: what travels between laboratories, adapters, workers and the registry.

The blueprint schema lives here and nowhere else. A document is valid exactly when
`Blueprint.model_validate_json(body, strict=True)` accepts it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from gradient_blueprints.canonical import MAX_SAFE_INTEGER, canonical_bytes, digest_of, is_exact
from gradient_blueprints.csv_tables import document_of, places_in_table, table_of
from gradient_blueprints.errors import InvalidDocument

SCHEMA_VERSION = 1
BLUEPRINT_FILE = "gradient_blueprint.json"
MAX_LAYERS = 20_000
PROFILE_TASK = "worker.profile_checkpoint"
"""Name of the Celery task that announces a job; its only argument is the job's id."""
PROFILE_QUEUE = "profile"
"""Queue of the broker that announcements go through."""
MAX_TIME_LIMIT = 7 * 86_400
"""Seconds that one attempt at a job may take at most; the broker's visibility timeout must be longer."""
MAX_SHARDS = 64

# A path segment that is also the name of a sub-resource of a model cannot be the second half of a model id.
RESERVED_SEGMENTS = (
    "aliases",
    "checkpoints",
    "compare",
    "evidence",
    "jobs",
    "labs",
    "runs",
    "selection",
    "staleness",
    "versions",
)
MODEL_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
LAB_NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"


def _refuse(container: Any, *_: Any, **__: Any) -> Any:
    raise TypeError("a blueprint is immutable; make another with Blueprint.from_dict(blueprint.to_dict() | {...})")


class FrozenList(list[Any]):
    """A list that refuses to change, so that a document with a digest cannot."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __copy__(self) -> FrozenList:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenList:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (list(self),)


class FrozenDict(dict[str, Any]):
    """A dict that refuses to change, likewise."""

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def _frozen_json(value: Any) -> Any:
    """As `_frozen`; integers that no digest could name are refused."""
    pointer = next(_inexact(value), None)
    if pointer is not None:
        raise PydanticCustomError(
            "integer_too_large",
            "{pointer}: the canonical form of this integer would denote another one: send it as text",
            {"pointer": pointer},
        )
    return _frozen(value)


def _frozen(value: Any) -> Any:
    """The same JSON value with its containers closed to changes."""
    if isinstance(value, dict):
        return FrozenDict({name: _frozen(member) for name, member in value.items()})
    if isinstance(value, list):
        return FrozenList(_frozen(member) for member in value)
    return value


def _inexact(value: Any) -> Iterator[str]:
    """JSON pointers to integers that have no exact canonical form, put together on the way back."""
    if type(value) is int:
        if not is_exact(value):
            yield ""
    elif isinstance(value, dict | list):
        for part, member in value.items() if isinstance(value, dict) else enumerate(value):
            for pointer in _inexact(member):
                yield f"/{escaped_in_pointer(part)}{pointer}"


def escaped_in_pointer(part: str | int) -> str:
    """As it stands in a JSON pointer (RFC 6901)."""
    return str(part).replace("~", "~0").replace("/", "~1")


DEFER_BUILD = tuple(int(part) for part in pydantic.VERSION.split(".")[:2]) >= (2, 14)
"""Whether validators are built at their first use instead of at import, which they would make longer. Before 2.14
two threads that used a model first at the same moment got in each other's way (pydantic's pull request 13438)."""


class Wire(BaseModel):
    """A typed, immutable value that travels as JSON; unknown fields are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=DEFER_BUILD, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def build_validators() -> None:
    """Build those of all types that were imported and of all to come, for processes that live long: a service."""
    kinds: list[type[Wire]] = [Wire]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        kind.model_config["defer_build"] = False
        kind.model_rebuild()


def _not_reserved(model_id: str) -> str:
    _, slash, name = model_id.partition("/")
    if slash and name in RESERVED_SEGMENTS:
        raise PydanticCustomError(
            "reserved_model_id",
            "the part after the slash names a sub-resource ({reserved}); choose another name",
            {"reserved": ", ".join(RESERVED_SEGMENTS)},
        )
    return model_id


def _four_places(checkpoint: float) -> float:
    if round(checkpoint, 4) != checkpoint:
        raise PydanticCustomError(
            "checkpoint_precision", "a training checkpoint is a fraction with at most 4 decimal places, such as 0.8"
        )
    return checkpoint


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise PydanticCustomError("interval_order", "an interval is [low, high] with low <= high")
    return interval


ModelId = Annotated[
    str,
    StringConstraints(pattern=rf"^{MODEL_ID_PATTERN}$", max_length=193),
    AfterValidator(_not_reserved),
    Field(description="`name` or `org/name`", examples=["foundation-7b"]),
]
Checkpoint = Annotated[
    float,
    Field(
        strict=True, gt=0, le=1, description="fraction of training processed, at most 4 decimal places", examples=[0.8]
    ),
    AfterValidator(_four_places),
]
LabName = Annotated[str, StringConstraints(pattern=rf"^{LAB_NAME_PATTERN}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
# First character: not one that a spreadsheet reads as a formula, nor blank.
LayerId = Annotated[
    str, StringConstraints(pattern=r"^[^\s\x00-\x1f\x7f=+\-@][^\x00-\x1f\x7f]*$", min_length=1, max_length=256)
]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/ -]*$", min_length=1, max_length=64)]
Text = Annotated[str, StringConstraints(max_length=2_000, pattern=r"^[^\x00]*$")]
# Numbers of requests are strict: JSON's `true` and `"1"` are no numbers, as the schema says.
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Weights = Annotated[dict[Tag, NonNegative], Field(min_length=1, max_length=256), AfterValidator(_frozen)]
FrozenJson = Annotated[dict[Tag, JsonValue], AfterValidator(_frozen_json)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_SAFE_INTEGER)]
Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]


_DECIMAL = re.compile(r"[0-9.eE+-]{1,32}")  # Decimal also takes blanks, underscores and the digits of other scripts


def parse_checkpoint(text: str | float | Decimal) -> Decimal:
    """The checkpoint that a path segment or argument names; 0.8, 0.80 and 8e-1 are the same.

    Raises ValueError unless it is a decimal in (0, 1] with at most 4 places.

    >>> parse_checkpoint("0.80") == parse_checkpoint("8e-1")
    True
    """
    spelled = str(text)
    try:
        if not _DECIMAL.fullmatch(spelled):
            raise InvalidOperation
        value = Decimal(spelled)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a training checkpoint: give a fraction such as 0.8") from None
    if not value.is_finite() or not 0 < value <= 1 or value != round(value, 4):
        raise ValueError(f"{text!r} is not a training checkpoint: a decimal in (0, 1] with at most 4 places")
    return round(value, 4)


def format_checkpoint(checkpoint: str | float | Decimal) -> str:
    """The shortest spelling, as it stands in URLs: 0.8, 1.

    >>> format_checkpoint(1.0), format_checkpoint("0.8000")
    ('1', '0.8')
    """
    return format(parse_checkpoint(checkpoint).normalize(), "f")


class LayerKind(StrEnum):
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"
    EMBEDDING = "embedding"
    NORMALIZATION = "normalization"
    HEAD = "head"
    OTHER = "other"


class Statistic(StrEnum):
    """How `gradient_norm` combines the batches."""

    MEAN = "mean"
    MEDIAN = "median"


class TailFit(Wire):
    """How `alpha` was fitted."""

    method: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="hill, log_binned or another named method"
    )
    start: Share | None = Field(None, description="share of the entries in the fitted tail")
    entries: Count | None = Field(None, description="entries in the tail")
    ks: Share | None = Field(None, description="Kolmogorov-Smirnov distance between the tail and the fit")
    versus_lognormal: float | None = Field(
        None,
        description="log likelihood ratio of the power law against the log-normal, plus ln(entries)/2 for the "
        "log-normal's second parameter; positive favours the power law",
    )


def _ascending(pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(later <= earlier for (earlier, _), (later, _) in itertools.pairwise(pairs)):
        raise PydanticCustomError("retained_mass_order", "the fractions of retained_mass must ascend strictly")
    return pairs


# A validator of the member, not of the layer: a layer without it pays nothing.
RetainedMass = Annotated[
    tuple[tuple[Share, Share], ...], Field(min_length=1, max_length=256), AfterValidator(_ascending)
]


class Layer(Wire):
    """One submodule. `id` and `gradient_norm` are required; the rest is as the profiler could measure it."""

    id: LayerId = Field(examples=["attn.0"])
    gradient_norm: NonNegative = Field(description="mean or median over batches of the norm of the batch gradient")
    alpha: NonNegative | None = Field(None, description="rank-size exponent of coordinate magnitudes, paper eq. 1")
    gamma: NonNegative | None = Field(None, description="1/(1 + alpha), paper Appendix A.1")
    k_star: NonNegative | None = Field(
        None,
        description="fraction worth updating: of the profiler the k that gains most per cost on the measured curve, or "
        "paper eq. 15 where the power law holds",
    )
    domain_tags: Weights | None = Field(None, description="weight per domain")
    parameters: Count | None = Field(None, description="number of parameters")
    kind: LayerKind | None = None
    depth: Annotated[int, Field(ge=0, le=100_000)] | None = Field(None, description="block index")
    gradient_norm_ci: Interval | None = None
    alpha_ci: Interval | None = None
    tail_fit: TailFit | None = None
    example_norm: NonNegative | None = Field(None, description="mean norm of the per-example gradient")
    signal: NonNegative | None = Field(
        None, description="norm of the mean gradient, freed of sampling noise: sqrt(max(0, unbiased ||mu||^2))"
    )
    spread: NonNegative | None = Field(None, description="trace of the per-example gradient covariance")
    first_order: float | None = Field(None, description="cross-validated first-order decrease of one Adam step")
    retained_mass: RetainedMass | None = Field(
        None, description="[k, share of the sum of |g| kept by the top k], k ascending"
    )
    domain_norms: Weights | None = Field(None, description="gradient norm per domain")


class CostModel(Wire):
    """C(k) = fixed + variable * k per parameter, paper section 4.1 (its alpha and beta)."""

    fixed: NonNegative
    variable: Positive


class Noise(Wire):
    """Differential privacy of the norms."""

    mechanism: Annotated[str, StringConstraints(max_length=64)]
    sigma: NonNegative | None = None
    clip: Positive | None = None
    epsilon: NonNegative | None = None
    delta: Share | None = None


class Provenance(Wire):
    """What was run on what."""

    profiler: Text | None = Field(None, description="name and version")
    weights_digest: Digest | None = None
    weights_revision: Text | None = None
    data: FrozenJson | None = Field(None, description="per domain: digest, source, documents")
    batches: Count | None = None
    batch_size: Count | None = None
    examples: Count | None = None
    tokens: Count | None = None
    sequence_length: Count | None = None
    loss: Annotated[dict[Tag, float], AfterValidator(_frozen_json)] | None = Field(
        None, description="mean validation loss per domain, nats per token"
    )
    seed: int | None = Field(None, ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)
    dtype: Text | None = None
    device: Text | None = None
    versions: Annotated[dict[Tag, Text], AfterValidator(_frozen_json)] | None = None
    resources: FrozenJson | None = Field(None, description="seconds, peak memory, energy as far as read")
    noise: Noise | None = None
    sources: tuple[Digest, ...] | None = Field(None, description="digests of the blueprints this one was made from")
    notes: Text | None = None


class Attachment(Wire):
    """A blob kept by its digest beside the document."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    media_type: Annotated[str, StringConstraints(pattern=r"^[\w.+-]+/[\w.+-]+$", max_length=127)]
    digest: Digest
    size: Count = Field(description="bytes")


class Warning_(Wire):  # noqa: N801 - the wire name is Warning; the builtin keeps its own
    """Something dubious but legal in a stored document."""

    model_config = ConfigDict(title="Warning")

    code: str
    pointer: str
    detail: str


class Publication(Wire):
    """The answer to a publish, and what the registry knows of a version beyond its bytes."""

    model_id: ModelId
    training_checkpoint: Checkpoint
    version: int = Field(strict=True, ge=1)
    digest: Digest
    created: bool = Field(description="false when this lab had published the same bytes before")
    lab: LabName
    warnings: tuple[Warning_, ...] = ()


def _unique_layer_ids(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    if len({layer.id for layer in layers}) < len(layers):
        seen: dict[str, int] = {}
        for index, layer in enumerate(layers):
            if layer.id in seen:
                raise PydanticCustomError(
                    "duplicate_layer",
                    "layer {index} repeats the id {id} of layer {first}; every id must be unique",
                    {"index": index, "id": repr(layer.id), "first": seen[layer.id], "pointer": f"/{index}/id"},
                )
            seen[layer.id] = index
    return layers


def _unique_attachment_names(attachments: tuple[Attachment, ...]) -> tuple[Attachment, ...]:
    seen: set[str] = set()
    for index, attachment in enumerate(attachments):
        if attachment.name in seen:
            raise PydanticCustomError(
                "duplicate_attachment",
                "attachment {index} repeats the name {name}; every name must be unique",
                {"index": index, "name": repr(attachment.name), "pointer": f"/{index}/name"},
            )
        seen.add(attachment.name)
    return attachments


class Blueprint(Wire):
    """A gradient blueprint: per-layer gradient statistics of one model at one training checkpoint.

    Exactly the paper's Appendix A.1 is valid; every further field is optional. Immutable.
    One that was fetched knows its `version`, `digest`, `lab` and `warnings`.

    >>> blueprint = Blueprint(model_id="tiny", training_checkpoint=0.8, layers=[{"id": "attn.0", "gradient_norm": 0.1}])
    >>> blueprint.layer("attn.0").gradient_norm
    0.1
    """

    schema_version: Literal[1] | None = None
    model_id: ModelId
    training_checkpoint: Checkpoint
    statistic: Statistic | None = None
    cost_model: CostModel | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS), AfterValidator(_unique_layer_ids)]
    attachments: (
        Annotated[tuple[Attachment, ...], Field(min_length=1, max_length=64), AfterValidator(_unique_attachment_names)]
        | None
    ) = None
    provenance: Provenance | None = None
    extra: Annotated[dict[str, JsonValue], AfterValidator(_frozen_json)] | None = Field(
        None, description="anything else; kept, never interpreted"
    )

    _publication: Publication | None = PrivateAttr(default=None)

    # --- what the registry said of it

    @property
    def version(self) -> int | None:
        """Version number in the registry; None for a document that was not fetched or published."""
        return self._publication.version if self._publication else None

    @property
    def lab(self) -> str | None:
        return self._publication.lab if self._publication else None

    @property
    def warnings(self) -> tuple[Warning_, ...]:
        return self._publication.warnings if self._publication else ()

    @cached_property
    def digest(self) -> str:
        """`sha256:...` of the canonical bytes."""
        return digest_of(self.to_canonical_bytes())

    def published_as(self, publication: Publication) -> Blueprint:
        """The same document, knowing what the registry calls it."""
        copy = self.model_copy()
        copy._publication = publication
        return copy

    # --- its layers

    def layer(self, layer_id: str) -> Layer:
        """The layer of that id; KeyError when there is none."""
        try:
            return self._layers_by_id[layer_id]
        except KeyError:
            raise KeyError(f"{self.model_id} at {self.training_checkpoint} has no layer {layer_id!r}") from None

    @cached_property
    def _layers_by_id(self) -> dict[str, Layer]:
        return {layer.id: layer for layer in self.layers}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with other values where `update` gives them; what was worked out of the old ones is forgotten."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("digest", "_layers_by_id") if update else ():
            copied.__dict__.pop(name, None)
        return copied

    # --- conversions

    @classmethod
    def from_json(cls, text: str | bytes) -> Blueprint:
        """Parse a document; pydantic.ValidationError points to what is wrong."""
        return cls.model_validate_json(text, strict=True)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Blueprint:
        return cls.from_json(json.dumps(document))

    @classmethod
    def from_csv(cls, text: str) -> Blueprint:
        """Parse a table; InvalidDocument or MalformedRequest point to the row and column of what is wrong."""
        document = document_of(text)
        try:
            return cls.from_dict(document)
        except ValidationError as invalid:
            raise InvalidDocument("The table is not a valid blueprint.", errors=places_in_table(invalid)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what was not given is absent."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_canonical_bytes(self) -> bytes:
        """The bytes that `digest` names (RFC 8785)."""
        return canonical_bytes(self.to_dict())

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_csv(self) -> str:
        """The same table, a row a layer; `from_csv` gives back an equal document."""
        return table_of(self.to_dict())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `gradient_blueprint.json` beside a model; returns its path."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        path = target / BLUEPRINT_FILE
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Blueprint:
        """Read what `save_pretrained` wrote; FileNotFoundError when it is not there."""
        path = Path(folder)
        return cls.from_json((path / BLUEPRINT_FILE if path.is_dir() else path).read_bytes())

    # --- for people

    def __eq__(self, other: object) -> bool:
        """Equal documents are equal, wherever they came from."""
        return isinstance(other, Blueprint) and self.to_canonical_bytes() == other.to_canonical_bytes()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return (
            f"<Blueprint {self.model_id} at {format_checkpoint(self.training_checkpoint)}{version}, "
            f"{len(self.layers)} layers, {self.digest[:19]}>"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The largest layers as a table, for notebooks."""
        from html import escape  # here: its table of entities would make every import of the client longer

        columns = ("id", "gradient_norm", "alpha", "gamma", "k_star")
        largest = sorted(self.layers, key=lambda layer: -layer.gradient_norm)[:10]
        cells = "".join(
            "<tr>" + "".join(f"<td>{escape(_shown(getattr(layer, name)))}</td>" for name in columns) + "</tr>"
            for layer in largest
        )
        header = "".join(f"<th>{name}</th>" for name in columns)
        more = f"<p>{len(self.layers) - len(largest)} more layers</p>" if len(self.layers) > len(largest) else ""
        return f"<p>{escape(repr(self)[1:-1])}</p><table><tr>{header}</tr>{cells}</table>{more}"


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- answers of the registry


class Page(Wire):
    """Fields of every listing; the next page is at `next`, also in the Link header."""

    next: str | None = Field(None, description="path and query of the next page; absent on the last")


class ModelSummary(Wire):
    model_id: ModelId
    owner: LabName
    created_at: datetime
    checkpoints: int = Field(description="number of checkpoints with a version")
    versions: int


class ModelPage(Page):
    models: tuple[ModelSummary, ...]


class VersionSummary(Wire):
    model_id: ModelId
    training_checkpoint: Checkpoint
    version: int
    digest: Digest
    lab: LabName
    layers: int
    size: int = Field(description="bytes of the canonical document")
    created_at: datetime
    yanked: bool
    yanked_reason: str | None = None


class VersionPage(Page):
    versions: tuple[VersionSummary, ...]


class CheckpointSummary(Wire):
    training_checkpoint: Checkpoint
    versions: int
    newest: int | None = Field(None, description="version that a fetch resolves to; absent when all are yanked")
    digest: Digest | None = None


class CheckpointPage(Page):
    checkpoints: tuple[CheckpointSummary, ...]


class Alias(Wire):
    """A movable name of a version."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
    model_id: ModelId
    training_checkpoint: Checkpoint
    version: int
    digest: Digest
    revision: int = Field(description="rises by one with each move; the ETag")
    updated_at: datetime


class AliasPage(Page):
    aliases: tuple[Alias, ...]


class AliasMove(Wire):
    """One entry of an alias' history."""

    revision: int
    training_checkpoint: Checkpoint | None = Field(None, description="absent when the alias was removed")
    version: int | None = None
    lab: LabName
    moved_at: datetime


class AliasHistory(Page):
    moves: tuple[AliasMove, ...]


class AliasTarget(Wire):
    """Body of `PUT .../aliases/{name}`."""

    training_checkpoint: Checkpoint
    version: int = Field(strict=True, ge=1)


class YankReason(Wire):
    reason: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00]*$")]


class LayerChange(Wire):
    """One layer of a comparison; a side is absent where that blueprint lacks the layer."""

    id: str
    base: float | None = Field(None, description="gradient norm in the base")
    other: float | None = None
    ratio: float | None = Field(None, description="other / base")
    base_rank: int | None = Field(None, description="1 is the largest norm")
    other_rank: int | None = None


class Comparison(Wire):
    base: VersionSummary
    other: VersionSummary
    layers: tuple[LayerChange, ...]
    matched: int
    only_base: tuple[str, ...]
    only_other: tuple[str, ...]
    spearman: float | None = Field(None, description="absent with fewer than 3 matched layers or a constant side")
    kendall: float | None = None
    top: int = Field(description="size of the compared top")
    entered_top: tuple[str, ...]
    left_top: tuple[str, ...]


# --- labs, keys, audit


class Scope(StrEnum):
    READ = "read"
    PUBLISH = "publish"
    PROFILE = "profile"
    WORK = "work"
    ADMIN = "admin"


class NewLab(Wire):
    name: LabName


class Lab(Wire):
    name: LabName
    created_at: datetime


class LabPage(Page):
    labs: tuple[Lab, ...]


class NewKey(Wire):
    lab: LabName
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    name: Annotated[str, StringConstraints(max_length=100, pattern=r"^[^\x00]*$")] = ""
    expires_at: datetime | None = None


class Key(Wire):
    """A key as the registry shows it: never its secret, only the prefix that it starts with."""

    id: int
    lab: LabName
    name: str
    prefix: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class IssuedKey(Key):
    """The only answer that holds the secret."""

    secret: str = Field(repr=False)


class KeyPage(Page):
    keys: tuple[Key, ...]


class WhoAmI(Wire):
    """Whose key it is and what it may do."""

    lab: LabName
    scopes: tuple[Scope, ...]
    key_prefix: str


class AuditEntry(Wire):
    id: int
    at: datetime
    lab: LabName | None = None
    key_prefix: str | None = None
    action: str
    subject: str
    details: dict[str, JsonValue]
    request_id: str | None = None


class AuditPage(Page):
    entries: tuple[AuditEntry, ...]


class BlobSummary(Wire):
    digest: Digest
    size: int
    created: bool


# --- jobs


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CRASHED = "crashed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CRASHED, JobState.CANCELLED}


class DataSource(Wire):
    """Text of one domain: a plain file (documents separated by blank lines do not matter), JSONL or Parquet."""

    source: Text = Field(
        description="path under an allowed root of the worker, `store:PATH` beside the checkpoint, or `s3://bucket/key`"
    )
    field: Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00]*$")] = Field(
        "text", description="member of JSONL, or column of Parquet, with the text"
    )
    format: Literal["text", "jsonl", "parquet"] | None = Field(
        None, description="told by the suffix .txt, .jsonl or .parquet unless given"
    )
    packing: Literal["packed", "padded"] = Field(
        "packed", description="packed: documents follow one another; padded: one document a sequence, cut at its length"
    )
    max_tokens: Annotated[int, Field(strict=True, ge=2, le=MAX_SAFE_INTEGER)] | None = Field(
        None, description="tokens to take at most, besides the limit by batches"
    )


Granularity = Literal["tensor", "submodule", "block"]


class ProfileOptions(Wire):
    sequence_length: Annotated[int, Field(strict=True, ge=2, le=131_072)] = 256
    batch_size: Annotated[int, Field(strict=True, ge=1, le=4_096)] = 4
    batches: Annotated[int, Field(strict=True, ge=1, le=100_000)] = Field(8, description="batches per domain")
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] = 0
    granularity: Granularity = "submodule"
    statistic: Statistic = Statistic.MEAN
    shards: Annotated[int, Field(strict=True, ge=1, le=MAX_SHARDS)] = Field(
        1, description="parts that the batches are spread over, for as many workers at once"
    )
    time_limit: Annotated[float, Field(strict=True, gt=0, le=MAX_TIME_LIMIT)] = Field(
        3_600, description="seconds of one attempt at a shard"
    )


class NewJob(Wire):
    model_id: ModelId
    training_checkpoint: Checkpoint
    source: Text = Field(
        description="config.json and safetensors: a folder under an allowed root of the worker, `store` for what was "
        "uploaded of this checkpoint, `s3://bucket/prefix`, or `hf://org/name@revision`"
    )
    data: Annotated[dict[Tag, DataSource], Field(min_length=1, max_length=64)]
    options: ProfileOptions = Field(default_factory=ProfileOptions, json_schema_extra={"default": {}})
    provenance_notes: Text | None = None


class Progress(Wire):
    """How far a running job is."""

    phase: Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")]
    done: Count = 0
    total: Count | None = None


class JobPart(Wire):
    """What one worker does of a job under one lease: a shard or, with number = shards, the merge of them all."""

    number: int
    state: JobState
    attempts: int
    progress: Progress | None = None
    reason: str | None = None
    digest: Digest | None = Field(None, description="of the partial result of a shard that is done")


class Job(Wire):
    id: str
    state: JobState
    lab: LabName
    model_id: ModelId
    training_checkpoint: Checkpoint
    source: str
    data: dict[Tag, DataSource]
    options: ProfileOptions
    provenance_notes: Text | None = None
    attempts: int = Field(description="of the part that was tried most often")
    max_attempts: int = Field(description="of each part")
    parts: tuple[JobPart, ...] = Field((), description="its shards; after the last of several, their merge")
    progress: Progress | None = Field(None, description="of several shards the sum")
    reason: str | None = Field(None, description="why it failed, crashed or was cancelled")
    version: int | None = Field(None, description="version of the blueprint that it published")
    digest: Digest | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobPage(Page):
    jobs: tuple[Job, ...]


class JobEvent(Wire):
    """One event of a job's stream; `id` is its SSE id."""

    id: int
    at: datetime
    state: JobState
    progress: Progress | None = None
    reason: str | None = None
    parts: dict[JobState, int] | None = Field(
        None, description="of a job with shards, how many parts are in which state"
    )


class Claim(Wire):
    """Answer to a claim: the job, which part of it to do, and the lease under which it may be worked on."""

    job: Job
    part: int = Field(0, description="a shard; or, with number = shards, their merge")
    lease_token: int = Field(description="fencing token; a later claim gets a larger one")
    lease_seconds: float


class Heartbeat(Wire):
    lease_token: int = Field(strict=True)
    progress: Progress | None = None


class HeartbeatAnswer(Wire):
    state: JobState = Field(description="cancelling: stop and report it")
    lease_seconds: float


class JobOutcome(Wire):
    """A worker's last word when there is no blueprint.

    `failed`: the job cannot succeed, however often it is tried. `crashed`: this attempt died; the job is queued
    again while it has attempts left. `queued`: given back undone by a worker that shuts down. `cancelled`: stopped
    as asked.
    """

    lease_token: int = Field(strict=True)
    state: Literal["failed", "crashed", "cancelled", "queued"]
    reason: Annotated[str, StringConstraints(max_length=4_000, pattern=r"^[^\x00]*$")]
