"""The methods of both clients on what many blueprints say together and whether one still holds, each written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from gradient_blueprints.blueprint_files import read_blueprint, table_of_files
from gradient_blueprints.calls import (
    JSON_BODY,
    Checkpointish,
    Connected,
    built,
    checkpoint_path,
    checkpoint_text,
    listing,
    method,
    model_path,
    some,
)
from gradient_blueprints.errors import ConfigurationError, ConnectionFailed
from gradient_blueprints.models import Blueprint, Job
from gradient_blueprints.statistics_models import (
    DEFAULT_THRESHOLD,
    AggregateResult,
    Aggregation,
    Consensus,
    Course,
    Criteria,
    Evidence,
    EvidencePage,
    EvidenceSummary,
    LocalLayer,
    LocalSample,
    Staleness,
    StalenessRequest,
    TableRow,
)
from gradient_blueprints.transport import Answer, Emit, NoAnswer, ReadOn, Request, Steps, Stream, Work

NDJSON = "application/x-ndjson"
Names = str | Iterable[str]
Versions = Literal["newest", "all"] | Sequence[int]
LocalValues = Mapping[str, float | Sequence[float]]
Item = TypeVar("Item", bound=BaseModel)


class StatisticsMethods(Connected):
    """Aggregation, staleness and its evidence."""

    @listing
    def aggregate_blueprints(
        self,
        models: Names = (),
        *,
        checkpoints: Iterable[Checkpointish] = (),
        from_checkpoint: Checkpointish | None = None,
        to_checkpoint: Checkpointish | None = None,
        versions: Versions = "newest",
        labs: Names = (),
        tags: Names = (),
        digests: Names = (),
        files: Iterable[str | Path] = (),
    ) -> Stream[TableRow]:
        """Every layer of the blueprints selected, as rows of one table (the paper's Appendix A.2).

        Rows come as they are read: neither side holds the table. `files` are added to what the registry holds, each
        that fits `models`, the checkpoints and `tags`; labs, versions and digests are the registry's alone. Without
        models, labs, versions and digests the files stand alone, and no registry is asked. Where two blueprints have a
        row of the same model, checkpoint and layer both come, with `collision` True.

            for row in client.aggregate_blueprints("foundation-7b", versions="all"):
                print(row.key, row.lab, row.layer.gradient_norm, row.collision)
        """
        narrowing = _narrowing(models, checkpoints, (from_checkpoint, to_checkpoint), tags)
        criteria = built(Criteria, **narrowing)
        places = tuple(files)
        local: list[TableRow] = yield Work(lambda: list(table_of_files(places, criteria.hold_for)))
        keys = {row.key for row in local}
        colliding: set[tuple[str, float, str]] = set()
        known: set[str] = set()
        if criteria.models or labs or digests or versions != "newest" or not places:
            wanted = _selection(AggregateResult.TABLE, narrowing, versions, labs, digests)
            in_files = {row.digest for row in local}
            among_files = {row.key for row in local if row.collision}

            def marked(row: TableRow) -> TableRow:
                known.add(row.digest)
                if row.digest not in in_files and row.key in keys:
                    colliding.add(row.key)
                elif row.key not in among_files:
                    return row
                return row.model_copy(update={"collision": True})

            yield from self._lines(TableRow, wanted, marked)
        for row in local:
            if row.digest not in known:
                yield Emit(row.model_copy(update={"collision": True}) if row.key in colliding else row)

    @listing
    def consensus_blueprints(
        self,
        models: Names = (),
        *,
        checkpoints: Iterable[Checkpointish] = (),
        from_checkpoint: Checkpointish | None = None,
        to_checkpoint: Checkpointish | None = None,
        versions: Versions = "newest",
        labs: Names = (),
        tags: Names = (),
        digests: Names = (),
    ) -> Stream[Consensus]:
        """What the labs say together, per model and checkpoint; `to_blueprint()` of one makes a blueprint of it.

        for consensus in client.consensus_blueprints("foundation-7b"):
            consensus.kendall_w, consensus.layers[0].gradient_norm, consensus.layers[0].spread
        """
        narrowing = _narrowing(models, checkpoints, (from_checkpoint, to_checkpoint), tags)
        yield from self._lines(Consensus, _selection(AggregateResult.CONSENSUS, narrowing, versions, labs, digests))

    @listing
    def training_courses(
        self,
        models: Names = (),
        *,
        checkpoints: Iterable[Checkpointish] = (),
        from_checkpoint: Checkpointish | None = None,
        to_checkpoint: Checkpointish | None = None,
        versions: Versions = "newest",
        labs: Names = (),
        tags: Names = (),
        digests: Names = (),
    ) -> Stream[Course]:
        """Per model, each layer from checkpoint to checkpoint: its norm, its rank, what rises and what falls."""
        narrowing = _narrowing(models, checkpoints, (from_checkpoint, to_checkpoint), tags)
        yield from self._lines(Course, _selection(AggregateResult.COURSE, narrowing, versions, labs, digests))

    def _lines(
        self, kind: type[Item], wanted: Aggregation, marked: Callable[[Item], Item] = lambda item: item
    ) -> Stream[Item]:
        """One item a line, parsed as the bytes come."""
        headers = {**JSON_BODY, "Accept": NDJSON}
        request = Request("POST", "/v1/aggregate", {}, headers, wanted.model_dump_json(exclude_none=True).encode())
        answer = yield from self._exchange(request, stream=True, silence=self.timeout)
        rest = b""
        try:
            while chunk := (yield ReadOn(answer)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield Emit(marked(_parsed(kind, line, answer)))
        except NoAnswer as lost:
            raise ConnectionFailed(
                f"The aggregation broke off: {lost}. Ask again; what came before was right."
            ) from lost
        if rest:
            raise answer.unexpected("whose last line is not complete")

    @method
    def check_staleness(
        self,
        model_id: str,
        checkpoint: Checkpointish,
        local: LocalSample | LocalValues | Blueprint | str | Path | None = None,
        *,
        digest: str | None = None,
        statistic: Literal["signal", "gradient_norm", "example_norm"] = "gradient_norm",
        version: int | None = None,
        lab: str | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        top: int | None = None,
        domain: str = "general",
        keep: bool = False,
        offer_norms: bool = False,
    ) -> Steps[Staleness]:
        """Whether the published blueprint still holds on local data.

        `local` is best given per batch, `{"attn.0": [0.051, 0.049, ...], ...}`, the batches in the same order in every
        layer; else a number a layer, a Blueprint of the local data or its file, or, with `digest`, a blueprint of the
        registry. `keep` lets the registry keep the verdict and coarse numbers (it needs a key).

            checked = client.check_staleness("foundation-7b", 0.8, {"attn.0": [0.05, 0.06], ...}, domain="code")
            checked.verdict, checked.advice, checked.level
        """
        if isinstance(local, str | Path):
            place = local
            given: LocalSample | LocalValues | Blueprint | None = yield Work(lambda: read_blueprint(place))
        else:
            given = local
        request = built(
            StalenessRequest,
            local=None if given is None else local_sample(given, statistic),
            digest=digest,
            version=version,
            lab=lab,
            threshold=threshold,
            top=top,
            domain=domain,
            keep=keep,
            offer_norms=offer_norms,
        )
        path = checkpoint_path(model_id, checkpoint, "staleness")
        body = request.model_dump_json(exclude_none=True).encode()
        answer = yield from self._exchange(Request("POST", path, {}, JSON_BODY, body, repeatable=not keep))
        return answer.parse(Staleness)

    @listing
    def list_evidence(
        self,
        model_id: str,
        checkpoint: Checkpointish,
        *,
        digest: str | None = None,
        domain: str | None = None,
        limit: int | None = None,
    ) -> Stream[Evidence]:
        """The checks of a checkpoint's blueprints that adapters let the registry keep, newest first."""
        path = checkpoint_path(model_id, checkpoint, "evidence")
        yield from self._pages(EvidencePage, "evidence", path, some(digest=digest, domain=domain), limit)

    @method
    def summarize_evidence(self, model_id: str) -> Steps[EvidenceSummary]:
        """In which domains and for how many users the blueprints of a model are going stale."""
        return (yield from self._read(EvidenceSummary, model_path(model_id, "evidence")))

    @method
    def refresh_blueprint(self, model_id: str, checkpoint: Checkpointish) -> Steps[Job]:
        """Repeat your lab's last successful profiling job of this checkpoint (scope profile)."""
        return (yield from self._write(Job, "POST", checkpoint_path(model_id, checkpoint, "refresh")))


def _parsed(kind: type[Item], line: bytes, answer: Answer) -> Item:
    try:
        return kind.model_validate_json(line, extra="ignore")
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_input=False)[0]
        raise answer.unexpected(f"with a line that is no {kind.__name__}: {fault['msg']}") from None


def _narrowing(
    models: Names,
    checkpoints: Iterable[Checkpointish],
    between: tuple[Checkpointish | None, Checkpointish | None],
    tags: Names,
) -> dict[str, Any]:
    """The values of Criteria."""
    earliest, latest = (None if end is None else float(checkpoint_text(end)) for end in between)
    return {
        "models": _names(models),
        "checkpoints": tuple(float(checkpoint_text(checkpoint)) for checkpoint in checkpoints),
        "from_checkpoint": earliest,
        "to_checkpoint": latest,
        "tags": _names(tags),
    }


def _selection(
    result: AggregateResult, narrowing: Mapping[str, Any], versions: Versions, labs: Names, digests: Names
) -> Aggregation:
    return built(
        Aggregation,
        **narrowing,
        result=result,
        versions=versions if isinstance(versions, str) else tuple(versions),
        labs=_names(labs),
        digests=_names(digests),
    )


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def local_sample(
    local: LocalSample | LocalValues | Blueprint, statistic: Literal["signal", "gradient_norm", "example_norm"]
) -> LocalSample:
    """A local sample from what callers have: a number or batches a layer, or a blueprint."""
    if isinstance(local, LocalSample):
        return local
    if isinstance(local, Blueprint):
        layers = [
            built(
                LocalLayer,
                id=layer.id,
                value=getattr(layer, statistic),
                interval=layer.gradient_norm_ci if statistic == "gradient_norm" else None,
                parameters=layer.parameters,
            )
            for layer in local.layers
            if getattr(layer, statistic) is not None
        ]
        if not layers:
            raise ConfigurationError(f"{local!r} holds no {statistic}; take statistic='gradient_norm'.")
    else:
        layers = [_local_layer(name, _plain(given)) for name, given in local.items()]
    return built(LocalSample, statistic=statistic, layers=tuple(layers))


def _local_layer(name: str, given: object) -> LocalLayer:
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        return built(LocalLayer, id=name, batches=tuple(map(_plain, given)))
    return built(LocalLayer, id=name, value=given)


def _plain(numbers: object) -> object:
    """The numbers that an array or a scalar of numpy or torch holds; anything else as it is."""
    return numbers.tolist() if hasattr(numbers, "tolist") else numbers
