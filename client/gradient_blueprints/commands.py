"""The commands of `blueprints`: tables for people, `--json` for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from gradient_blueprints.calls import own_version
from gradient_blueprints.client import Client
from gradient_blueprints.errors import ConfigurationError, Unauthenticated
from gradient_blueprints.models import (
    MAX_SHARDS,
    MAX_TIME_LIMIT,
    Alias,
    Blueprint,
    Granularity,
    Job,
    JobEvent,
    JobState,
    Publication,
    Statistic,
    VersionSummary,
    format_checkpoint,
)
from gradient_blueprints.run_models import Resource
from gradient_blueprints.selection_models import BudgetMeasure, Criterion, format_bytes
from gradient_blueprints.statistics_models import (
    DEFAULT_THRESHOLD,
    AggregateResult,
    Consensus,
    Course,
    TableRow,
)

SHOWN_LAYERS = 20
WIDEST = 10_000  # columns of a table that goes into a pipe: a row stays a line

app = typer.Typer(
    help="Publish, fetch and compare gradient blueprints.\n\n"
    "The registry is named by BLUEPRINTS_URL (or --url) and the key by BLUEPRINTS_API_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its frames would show keys
    add_completion=False,
)
alias_app = typer.Typer(help="Movable names of a model's versions.", no_args_is_help=True)
app.add_typer(alias_app, name="alias")

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="`name` or `org/name`")]
CheckpointArgument = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="fraction of training, such as 0.8")]
VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", min=1)]
JobArgument = Annotated[str, typer.Argument(metavar="JOB")]
AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
LabOption = Annotated[str | None, typer.Option("--lab", help="of this lab; * for any")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="show at most so many")]
IfRevision = Annotated[
    int | None, typer.Option(min=0, help="only while the alias is at this revision; 0: not there yet")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(own_version())
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="the registry; else BLUEPRINTS_URL")] = None,
    timeout: Annotated[float, typer.Option(help="seconds to keep trying")] = 20.0,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    context.obj = {"url": url, "timeout": timeout}


@contextmanager
def _registry(context: typer.Context) -> Iterator[Client]:
    with Client(**context.obj) as client:
        try:
            yield client
        except Unauthenticated as error:
            error.detail += " Set BLUEPRINTS_API_KEY to a key of your lab."
            raise


# --- blueprints


@app.command()
def publish(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(exists=True, metavar="FILE...", help=".json or .csv")],
    as_json: AsJson = False,
) -> None:
    """Publish blueprint files, each as the next version of its model and checkpoint."""
    published = []
    with _registry(context) as client:
        for file in files:
            published.append(client.publish_blueprint(file))
            if not as_json:  # at once, so that what is published is known also when a later file is refused
                _say_publication(published[-1])
    if as_json:
        _print_json(published)


def _say_publication(publication: Publication) -> None:
    what = "Published" if publication.created else "Known already:"
    checkpoint = format_checkpoint(publication.training_checkpoint)
    _say(f"{what} {publication.model_id} at {checkpoint} version {publication.version}, {publication.digest}")
    for warning in publication.warnings:
        _say(f"  warning {warning.code} at {warning.pointer}: {warning.detail}")


@app.command()
def fetch(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the document to this file")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="as CSV instead of JSON, as to a file .csv")] = False,
    version: Annotated[int | None, typer.Option(min=1, help="this version instead of the newest")] = None,
    digest: Annotated[str | None, typer.Option(help="the one with this digest")] = None,
    lab: LabOption = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="the nearest checkpoint, if not this")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a blueprint: to a file, as CSV or JSON to the output, or as a table of its largest layers."""
    if csv and as_json and output is None:
        raise typer.BadParameter("the output is CSV or JSON, not both", param_hint="--csv")
    with _registry(context) as client:
        blueprint = client.fetch_blueprint(model, checkpoint, version=version, digest=digest, lab=lab, nearest=nearest)
    if output is not None:
        table = csv or output.suffix.lower() == ".csv"
        # newline="": a CSV table has its own line ends
        output.write_text(blueprint.to_csv() if table else blueprint.to_json() + "\n", encoding="utf-8", newline="")
        if as_json:
            _print_json({"file": str(output), **_identity(blueprint)})
        else:
            _say(f"{output}: {blueprint!r}")
    elif csv:
        typer.echo(blueprint.to_csv(), nl=False)
    elif as_json:
        typer.echo(blueprint.to_json())
    else:
        _say(f"{blueprint!r}")
        _print_layers(blueprint)
    for warning in blueprint.warnings:
        typer.echo(f"warning {warning.code} at {warning.pointer or '/'}: {warning.detail}", err=True)


@app.command()
def compare(
    context: typer.Context,
    model: ModelArgument,
    base: Annotated[str, typer.Argument(metavar="BASE", help="CHECKPOINT or CHECKPOINT@VERSION")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="CHECKPOINT or CHECKPOINT@VERSION")],
    top: Annotated[int | None, typer.Option(min=1, help="size of the compared top")] = None,
    lab: LabOption = None,
    as_json: AsJson = False,
) -> None:
    """Show what changed from one blueprint of a model to another."""
    with _registry(context) as client:
        comparison = client.compare_blueprints(model, base, other, top=top, lab=lab)
    if as_json:
        _print_json(comparison)
        return
    for name, side in (("base", comparison.base), ("other", comparison.other)):
        checkpoint = format_checkpoint(side.training_checkpoint)
        _say(f"{name}: {side.model_id} at {checkpoint} version {side.version} of {side.lab}")
    spearman, kendall = _number(comparison.spearman), _number(comparison.kendall)
    _say(f"{comparison.matched} layers in both; Spearman {spearman}, Kendall {kendall}")
    _say(f"entered the top {comparison.top}: {', '.join(comparison.entered_top) or 'none'}")
    _say(f"left the top {comparison.top}: {', '.join(comparison.left_top) or 'none'}")
    largest = sorted(comparison.layers, key=lambda layer: -(layer.other or layer.base or 0))
    rows = [
        (row.id, _number(row.base), _number(row.other), _number(row.ratio), row.base_rank, row.other_rank)
        for row in largest
    ]
    _print_table(("layer", "base", "other", "ratio", "rank", "new rank"), rows[:SHOWN_LAYERS], of=len(rows))


# --- models and versions


@app.command("list")
def list_models(
    context: typer.Context,
    query: Annotated[str | None, typer.Argument(help="part of the model id")] = None,
    limit: LimitOption = None,
    as_json: AsJson = False,
) -> None:
    """List models."""
    with _registry(context) as client:
        models = list(client.list_models(query, limit=limit))
    if as_json:
        _print_json(models)
    else:
        rows = [(model.model_id, model.owner, model.checkpoints, model.versions) for model in models]
        _print_table(("model", "owner", "checkpoints", "versions"), rows)


@app.command()
def versions(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="else the checkpoints are listed")
    ] = None,
    lab: LabOption = None,
    limit: LimitOption = None,
    as_json: AsJson = False,
) -> None:
    """List the versions at a checkpoint, newest first, or the checkpoints of a model."""
    if checkpoint is None and lab is not None:
        raise typer.BadParameter("a lab has versions at a checkpoint: name the CHECKPOINT too", param_hint="--lab")
    with _registry(context) as client:
        if checkpoint is None:
            checkpoints = list(client.list_checkpoints(model, limit=limit))
            if as_json:
                _print_json(checkpoints)
            else:
                found = [
                    (format_checkpoint(row.training_checkpoint), row.versions, row.newest, row.digest)
                    for row in checkpoints
                ]
                _print_table(("checkpoint", "versions", "newest", "digest"), found)
            return
        listed = list(client.list_versions(model, checkpoint, lab=lab, limit=limit))
    if as_json:
        _print_json(listed)
    else:
        rows = [
            (row.version, row.lab, row.layers, _moment(row.created_at), row.digest, _yanked(row) if row.yanked else "")
            for row in listed
        ]
        _print_table(("version", "lab", "layers", "published", "digest", "yanked"), rows)


@app.command()
def yank(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    version: VersionArgument,
    reason: Annotated[str, typer.Option(help="told to whoever fetches it nevertheless")],
    as_json: AsJson = False,
) -> None:
    """Take one of your versions out of resolution; it stays fetchable by digest and version."""
    with _registry(context) as client:
        _print_changed(client.yank_version(model, checkpoint, version, reason=reason), as_json)


@app.command()
def unyank(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    version: VersionArgument,
    as_json: AsJson = False,
) -> None:
    """Put a yanked version back."""
    with _registry(context) as client:
        _print_changed(client.unyank_version(model, checkpoint, version), as_json)


@app.command()
def whoami(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the lab and the scopes of your key."""
    with _registry(context) as client:
        caller = client.whoami()
    if as_json:
        _print_json(caller)
    else:
        _say(f"{caller.key_prefix}...: lab {caller.lab}, scopes {', '.join(caller.scopes)}")


# --- aliases


@alias_app.command("set")
def set_alias(
    context: typer.Context,
    model: ModelArgument,
    name: AliasArgument,
    checkpoint: CheckpointArgument,
    version: VersionArgument,
    if_revision: IfRevision = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version."""
    with _registry(context) as client:
        _print_aliases([client.set_alias(model, name, checkpoint, version, if_revision=if_revision)], as_json, one=True)


@alias_app.command("get")
def get_alias(context: typer.Context, model: ModelArgument, name: AliasArgument, as_json: AsJson = False) -> None:
    """Show where an alias points."""
    with _registry(context) as client:
        _print_aliases([client.get_alias(model, name)], as_json, one=True)


@alias_app.command("list")
def list_aliases(
    context: typer.Context, model: ModelArgument, limit: LimitOption = None, as_json: AsJson = False
) -> None:
    """List the aliases of a model."""
    with _registry(context) as client:
        _print_aliases(list(client.list_aliases(model, limit=limit)), as_json)


@alias_app.command("history")
def alias_history(
    context: typer.Context,
    model: ModelArgument,
    name: AliasArgument,
    limit: LimitOption = None,
    as_json: AsJson = False,
) -> None:
    """Show where an alias has pointed."""
    with _registry(context) as client:
        moves = list(client.alias_history(model, name, limit=limit))
    if as_json:
        _print_json(moves)
    else:
        rows = [
            (
                move.revision,
                _checkpoint(move.training_checkpoint),
                move.version or "removed",
                move.lab,
                _moment(move.moved_at),
            )
            for move in moves
        ]
        _print_table(("revision", "checkpoint", "version", "lab", "moved"), rows)


@alias_app.command("delete")
def delete_alias(
    context: typer.Context,
    model: ModelArgument,
    name: AliasArgument,
    if_revision: IfRevision = None,
    as_json: AsJson = False,
) -> None:
    """Remove an alias; its history stays."""
    with _registry(context) as client:
        client.delete_alias(model, name, if_revision=if_revision)
    if as_json:
        _print_json({"model_id": model, "name": name, "deleted": True})
    else:
        _say(f"Deleted the alias {name} of {model}")


# --- statistics


@app.command()
def aggregate(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]")] = None,
    result: Annotated[AggregateResult, typer.Option(help="every row, a consensus, or the course over training")] = (
        AggregateResult.TABLE
    ),
    checkpoint: Annotated[list[str] | None, typer.Option(help="only these checkpoints")] = None,
    since: Annotated[str | None, typer.Option("--from", help="at this checkpoint or later")] = None,
    until: Annotated[str | None, typer.Option("--to", help="at this checkpoint or earlier")] = None,
    every: Annotated[bool, typer.Option("--all", help="every version, not each lab's newest")] = False,
    version: Annotated[list[int] | None, typer.Option(min=1, help="these versions")] = None,
    lab: Annotated[list[str] | None, typer.Option(help="only these labs")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="only blueprints with a weight for this domain")] = None,
    digest: Annotated[list[str] | None, typer.Option(help="the blueprint with this digest too")] = None,
    file: Annotated[list[Path] | None, typer.Option(exists=True, help="this file too (table only)")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="save one consensus as a blueprint")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print NDJSON, a line as it comes")] = False,
) -> None:
    """Combine blueprints of many labs, checkpoints and versions."""
    if every and version:
        raise typer.BadParameter("these versions or --all, not both", param_hint="--version")
    if output is not None and result is not AggregateResult.CONSENSUS:
        raise typer.BadParameter("only a consensus is a blueprint: add --result consensus", param_hint="--output")
    if file and result is not AggregateResult.TABLE:
        raise typer.BadParameter("files join the table only", param_hint="--file")
    selection: dict[str, Any] = {
        "checkpoints": checkpoint or (),
        "from_checkpoint": since,
        "to_checkpoint": until,
        "versions": version or ("all" if every else "newest"),
        "labs": lab or (),
        "tags": tag or (),
        "digests": digest or (),
    }
    with _registry(context) as client:
        if result is AggregateResult.TABLE:
            rows = client.aggregate_blueprints(models or (), **selection, files=file or ())
            _print_rows(rows) if not as_json else _print_lines(rows)
        elif result is AggregateResult.CONSENSUS:
            found = client.consensus_blueprints(models or (), **selection)
            if output is not None:
                _save_consensus(list(found), output)
            elif as_json:
                _print_lines(found)
            else:
                for consensus in found:
                    _print_consensus(consensus)
        else:
            courses = client.training_courses(models or (), **selection)
            if as_json:
                _print_lines(courses)
            else:
                for course in courses:
                    _print_course(course)


def _print_lines(values: Iterable[BaseModel]) -> None:
    for value in values:
        typer.echo(value.model_dump_json(exclude_none=True))


def _print_rows(rows: Iterable[TableRow]) -> None:
    """As a table without end: nothing is held to make columns of one width."""
    typer.echo("model\tcheckpoint\tlayer\tgradient_norm\tlab\tversion\tcollision")
    for row in rows:
        cells = (
            row.model_id,
            format_checkpoint(row.training_checkpoint),
            row.layer.id,
            _number(row.layer.gradient_norm),
            row.lab or "",
            row.version or "",
            "collides" if row.collision else "",
        )
        typer.echo("\t".join(map(str, cells)))


def _save_consensus(found: list[Consensus], output: Path) -> None:
    if len(found) != 1 or not found[0].layers:
        raise ConfigurationError(
            f"This selection has {len(found)} consensuses with layers to save; name one model and one checkpoint."
        )
    blueprint = found[0].to_blueprint()
    output.write_text(blueprint.to_json() + "\n", encoding="utf-8")
    _say(f"{output}: {blueprint!r}")


def _print_consensus(consensus: Consensus) -> None:
    voices = [source for source in consensus.sources if source.left_out is None]
    agreement = f"Kendall's W {_number(consensus.kendall_w)} over {consensus.complete_layers} layers"
    checkpoint = format_checkpoint(consensus.training_checkpoint)
    _say(f"{consensus.model_id} at {checkpoint}: {consensus.status} of {len(voices)} labs, {agreement}")
    for source in consensus.sources:
        if source.left_out is not None:
            _say(f"  {source.lab} version {source.version} is left out: {source.left_out}")
    largest = sorted(consensus.layers, key=lambda layer: (layer.rank is None, layer.rank or 0, layer.id))
    rows = [
        (
            layer.rank,
            layer.id,
            _number(layer.gradient_norm),
            layer.labs,
            _number(layer.spread),
            layer.influence.lab if layer.influence else "",
        )
        for layer in largest
    ]
    _print_table(("rank", "layer", "norm", "labs", "spread", "most influential"), rows[:SHOWN_LAYERS], of=len(rows))


def _print_course(course: Course) -> None:
    _say(f"{course.model_id} over {len(course.checkpoints)} checkpoints")
    for pair in course.neighbours:
        between = f"{format_checkpoint(pair.from_checkpoint)} to {format_checkpoint(pair.to_checkpoint)}"
        _say(f"  {between}: Spearman {_number(pair.spearman)} over {pair.layers} layers")
    _say(f"rising: {', '.join(course.rising) or 'none'}")
    _say(f"falling: {', '.join(course.falling) or 'none'}")


@app.command()
def stale(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    local: Annotated[
        Path | None, typer.Argument(exists=True, help="local blueprint, or JSON of layer ids and their batches")
    ] = None,
    digest: Annotated[str | None, typer.Option(help="compare with this blueprint of the registry instead")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="check this version instead of the newest")] = None,
    lab: LabOption = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="correlation to be reached")] = DEFAULT_THRESHOLD,
    top: Annotated[int | None, typer.Option(min=1, help="size of the top in use")] = None,
    domain: Annotated[
        str, typer.Option(help="what the local data are; its published norms are compared, if any")
    ] = "general",
    keep: Annotated[bool, typer.Option("--keep", help="let the registry keep the verdict (coarse numbers)")] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether a blueprint still holds on local data; exits 1 when it does not, nor at a coarser level."""
    with _registry(context) as client:
        checked = client.check_staleness(
            model,
            checkpoint,
            None if local is None else _local_values(local),
            digest=digest,
            version=version,
            lab=lab,
            threshold=threshold,
            top=top,
            domain=domain,
            keep=keep,
        )
    if as_json:
        _print_json(checked)
    other = "local" if digest is None else "other"
    if not checked.matched:
        raise ConfigurationError(
            f"The {other} side has no layer of the published one ({_some(checked.only_local)} against "
            f"{_some(checked.only_published)}): measure it by the same layers."
        )
    if not as_json:
        _say(f"{checked.verdict}: {checked.advice}" + (f" at level {checked.level}" if checked.level else ""))
        rows = [
            (
                level.level,
                level.n,
                _number(level.spearman),
                _number(level.ceiling),
                _number(level.corrected),
                " to ".join(map(_number, level.corrected_ci)) if level.corrected_ci else "–",
                level.verdict,
                ", ".join(level.reasons),
            )
            for level in checked.levels
        ]
        columns = ("level", "n", "Spearman", "ceiling", "corrected", "95 %", "verdict", "because")
        _print_table(columns, rows)
        _say(f"top {checked.top}: {_number(checked.top_overlap)} in common, {_number(checked.top_by_chance)} by chance")
        for side, unmatched in (("published", checked.only_published), (other, checked.only_local)):
            if unmatched:
                _say(f"{len(unmatched)} layers on the {side} side alone, such as {_some(unmatched)}")
        if checked.domain != checked.published_domain:
            _say(f"held against its general norms: it publishes none of {checked.domain!r} for every layer")
        if checked.not_kept:
            _say(f"not kept: {checked.not_kept}")
    if checked.level is None:
        raise typer.Exit(1)


def _some(layers: Sequence[str]) -> str:
    return repr(layers[0]) if layers else "none"


@app.command("select")
def select_layers(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    budget: Annotated[str, typer.Argument(help="10%, a number of parameters such as 3e6, or bytes such as 2GB")],
    local: Annotated[
        Path | None, typer.Argument(exists=True, help="local blueprint, or JSON of layer ids and their norms")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="whole layers instead of a fraction of each")] = False,
    criterion: Annotated[Criterion, typer.Option(help="what a layer is worth")] = Criterion.NORM,
    trust: Annotated[float | None, typer.Option(min=0, max=1, help="weight of the published side")] = None,
    version: Annotated[int | None, typer.Option(min=1)] = None,
    lab: LabOption = None,
    as_json: AsJson = False,
) -> None:
    """Choose which layers, or which fraction of each, to train within a budget (Algorithm 1)."""
    amount, measure = _budget(budget)
    with _registry(context) as client:
        chosen = client.select_layers(
            model,
            checkpoint,
            amount,
            None if local is None else _local_values(local),
            measure=measure,
            unit="layer" if whole else "coordinate",
            criterion=criterion,
            trust=trust,
            version=version,
            lab=lab,
        )
    if as_json:
        _print_json(chosen)
        return
    share = chosen.selected / max(1, chosen.parameters)
    _say(f"{chosen.selected:,} of {chosen.parameters:,} parameters ({share:.1%}), trust {chosen.trust:.2f}")
    _say(
        f"training memory {format_bytes(chosen.training_bytes)}, a full AdamW update {format_bytes(chosen.full_bytes)}"
    )
    if not chosen.exact:
        _say("the search for the best whole layers was cut short: a better choice may exist")
    largest = sorted((layer for layer in chosen.layers if layer.selected), key=lambda layer: -layer.selected)
    rows = [(layer.id, layer.parameters, f"{layer.fraction:.1%}", _number(layer.share)) for layer in largest]
    _print_table(("layer", "parameters", "trained", "share"), rows[:SHOWN_LAYERS], of=len(rows))


def _budget(text: str) -> tuple[float, BudgetMeasure]:
    """`10%`, `2GB`, `300MB`, `3e6`."""
    units = {"%": (0.01, BudgetMeasure.FRACTION)} | {
        unit: (scale, BudgetMeasure.BYTES) for unit, scale in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("B", 1.0))
    }
    ending = next((unit for unit in units if text.upper().endswith(unit)), "")
    scale, measure = units.get(ending, (1.0, BudgetMeasure.PARAMETERS))
    try:
        amount = float(text[: len(text) - len(ending)]) * scale
    except ValueError:
        raise ConfigurationError(f"{text!r} is no budget: give 10%, 3e6 (parameters) or 2GB.") from None
    if measure is BudgetMeasure.PARAMETERS and 0 < amount < 1:
        raise ConfigurationError(f"{text} would be less than one parameter: a share of them is {100 * amount:g}%.")
    return amount, measure


def _local_values(path: Path) -> Any:
    """A blueprint file, or a JSON object of layer ids and their values or batches."""
    if path.suffix.lower() == ".json":
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not JSON: {error}.") from None
        if isinstance(data, dict) and "layers" not in data:
            return data
    return path


# --- jobs


@app.command()
def upload(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="as save_pretrained writes it")],
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the registry's store, for its workers to profile; goes on where an upload broke off."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _registry(context) as client, Progress(*columns, console=_out(), disable=as_json) as bar:
        tasks: dict[str, TaskID] = {}

        def show(path: str, sent: int, size: int) -> None:
            if path not in tasks:
                tasks[path] = bar.add_task(path, total=size)
            bar.update(tasks[path], completed=sent)

        files = client.upload_checkpoint(folder, model, checkpoint, progress=show)
    if as_json:
        _print_json(list(files))
    else:
        _say(f"{len(files)} files of {model} at {checkpoint} are in the registry: blueprints submit --source store")


@app.command()
def submit(
    context: typer.Context,
    model: ModelArgument,
    checkpoint: CheckpointArgument,
    data: Annotated[list[str], typer.Option("--data", metavar="DOMAIN=PATH", help="text of a domain; may be repeated")],
    source: Annotated[
        str, typer.Option(help="store: what was uploaded; or a folder as the workers see it, s3://, hf://")
    ] = "store",
    batches: Annotated[int | None, typer.Option(min=1, help="batches per domain")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    granularity: Annotated[Granularity | None, typer.Option(help="what is a layer")] = None,
    statistic: Annotated[Statistic | None, typer.Option(help="how norms of batches are combined")] = None,
    shards: Annotated[int | None, typer.Option(min=1, max=MAX_SHARDS, help="parts for as many workers at once")] = None,
    time_limit: Annotated[
        float | None, typer.Option(max=MAX_TIME_LIMIT, help="seconds of one attempt, after which the job has failed")
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="stay and watch the job")] = False,
    as_json: AsJson = False,
) -> None:
    """Have the registry's workers profile a checkpoint."""
    texts: dict[str, str] = {}
    for item in data:
        domain, equals, path = item.partition("=")
        if not (domain and equals and path):
            raise typer.BadParameter(f"{item!r} is not DOMAIN=PATH", param_hint="--data")
        if domain in texts:
            raise typer.BadParameter(f"{domain} is given twice: join its texts in one file", param_hint="--data")
        texts[domain] = path
    options: dict[str, Any] = {"batches": batches, "batch_size": batch_size, "sequence_length": sequence_length}
    options |= {"seed": seed, "granularity": granularity, "statistic": statistic, "shards": shards}
    options |= {"time_limit": time_limit}
    options = {name: value for name, value in options.items() if value is not None}
    with _registry(context) as client:
        job = client.submit_checkpoint(model, checkpoint, source=source, data=texts, **options)
        if follow:
            if not as_json:
                _say(f"Job {job.id} is {job.state}")
            _follow(client, job.id, as_json)
        elif as_json:
            _print_json(job)
        else:
            _say(f"Job {job.id} is {job.state}. Watch it: blueprints watch {job.id}")


@app.command()
def watch(context: typer.Context, job: JobArgument, as_json: AsJson = False) -> None:
    """Watch a job to its end; exits 1 unless it succeeds."""
    with _registry(context) as client:
        _follow(client, job, as_json)


@app.command()
def jobs(
    context: typer.Context,
    state: Annotated[JobState | None, typer.Option(help="only those in this state")] = None,
    limit: LimitOption = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _registry(context) as client:
        listed = list(client.list_jobs(state, limit=limit))
    if as_json:
        _print_json(listed)
    else:
        rows = [
            (
                job.id,
                job.state,
                job.model_id,
                _checkpoint(job.training_checkpoint),
                _moment(job.created_at),
                job.reason or "",
            )
            for job in listed
        ]
        _print_table(("job", "state", "model", "checkpoint", "submitted", "reason"), rows)


@app.command()
def cancel(context: typer.Context, job: JobArgument, as_json: AsJson = False) -> None:
    """Cancel a job."""
    with _registry(context) as client:
        cancelled = client.cancel_job(job)
    if as_json:
        _print_json(cancelled)
    else:
        _say(f"Job {cancelled.id} is {cancelled.state}")


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    if as_json:
        for event in client.watch_job(job_id):
            typer.echo(event.model_dump_json(exclude_none=True))
    else:
        _draw(client.watch_job(job_id))
    job = client.get_job(job_id)
    if not as_json:
        _say(_ending(job))
    if job.state is not JobState.SUCCEEDED:
        raise typer.Exit(1)


def _draw(events: Iterable[JobEvent]) -> None:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    events = iter(events)
    first = list(islice(events, 1))  # an unknown job is refused here, before there is a bar
    with Progress(*columns, console=_out()) as bar:
        task = bar.add_task("queued", total=None)
        for event in chain(first, events):
            progress = event.progress
            phase = f" {progress.phase}" if progress else ""
            parts = ", ".join(f"{number} {state}" for state, number in (event.parts or {}).items())
            bar.update(task, description=f"{event.state}{phase}" + (f" ({parts})" if parts else ""))
            if progress:
                bar.update(task, completed=progress.done, total=progress.total)
            if event.state is JobState.SUCCEEDED:  # the last of its steps may have gone unreported
                whole = bar.tasks[task].total or 1
                bar.update(task, completed=whole, total=whole)


def _ending(job: Job) -> str:
    if job.state is JobState.SUCCEEDED:
        checkpoint = format_checkpoint(job.training_checkpoint)
        return f"Job {job.id} succeeded: {job.model_id} at {checkpoint} version {job.version}, {job.digest}"
    return f"Job {job.id} is {job.state}" + (f": {job.reason}" if job.reason else "")


# --- runs


@app.command()
def leaderboard(
    context: typer.Context,
    task: Annotated[str, typer.Argument(metavar="TASK")],
    resource: Annotated[Resource, typer.Option(help="what was spent")] = Resource.ENERGY_KWH,
    gamma: Annotated[float | None, typer.Option(min=0, help="compare what so much of it bought")] = None,
    psi: Annotated[float | None, typer.Option(help="compare what this score took")] = None,
    metric: Annotated[str | None, typer.Option(help="else that of most runs")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank the runs of a task by capability per resource."""
    with _registry(context) as client:
        board = client.leaderboard(task, resource, at_gamma=gamma, at_psi=psi, metric=metric)
    if as_json:
        _print_json(board)
        return
    for group in board.groups:
        how = f"{group.basis}: {', '.join(group.instruments)}"
        missing = f", without {', '.join(group.missing)}" if group.missing else ""
        wanted = f"{resource} to reach" if group.at.axis == "psi" else f"{board.metric} with {resource} ="
        _say(f"{wanted} {_number(group.at.value)} ({how}{missing})")
        rows = [
            (
                entry.rank,
                entry.lab,
                entry.model_id,
                _number(entry.value) if entry.value is not None else f"{entry.reached:.0%} of runs",
                "–" if entry.value_interval is None else " to ".join(map(_number, entry.value_interval)),
                entry.seeds,
                _number(entry.area),
                "front" if any(run.on_front for run in entry.runs) else "",
                ", ".join(f"{name}={value}" for name, value in entry.settings.items()),
                ", ".join(sorted({mark for run in entry.runs for mark in run.marks})),
            )
            for entry in group.entries
        ]
        columns = ("rank", "lab", "model", "value", "95 %", "seeds", "area", "front", "settings", "cannot be right")
        _print_table(columns, rows)
    if not board.groups and not board.left_out:
        _say(f"no runs of {task}: `blueprints runs` lists what there is, with its tasks")
        return
    reasons = Counter(row.reason for row in board.left_out)
    _say(f"left out: {', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items())) or 'none'}")


@app.command()
def runs(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument(metavar="[TASK]")] = None,
    model: Annotated[str | None, typer.Option(help="only of this model")] = None,
    lab: Annotated[str | None, typer.Option(help="only of this lab")] = None,
    limit: LimitOption = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with _registry(context) as client:
        listed = list(client.list_runs(task, model=model, lab=lab, limit=limit))
    if as_json:
        _print_json(listed)
        return
    rows = [
        (
            run.id,
            run.task,
            run.lab,
            run.model_id,
            run.seed,
            run.points,
            "–" if run.last is None else f"{run.metric} {_number(run.last.psi)}",
            "running" if run.finished_at is None else _moment(run.finished_at),
            ", ".join(mark.code for mark in run.marks),
        )
        for run in listed
    ]
    columns = ("run", "task", "lab", "model", "seed", "points", "last", "finished", "cannot be right")
    _print_table(columns, rows)


@app.command("send-run")
def send_run(
    context: typer.Context,
    journal: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="run.jsonl, as a callback keeps it")],
    as_json: AsJson = False,
) -> None:
    """Send what the registry does not have yet of a run that was kept on disk."""
    with _registry(context) as client:
        run = client.send_run(journal)
    if as_json:
        _print_json(run)
    else:
        state = "not finished" if run.finished_at is None else "finished"
        _say(f"Run {run.id} has {run.points} points and is {state}")


# --- printing


def _out() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDEST, emoji=False)  # a:key:b stays as it is


def _say(text: str) -> None:
    _out().print(text, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, of: int | None = None) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # a digest that ends in an ellipsis is of no use to the next command
    for row in rows:
        table.add_row(*("" if cell is None else Text(str(cell)) for cell in row))
    _out().print(table)
    if of is not None and of > len(rows):
        _say(f"{of - len(rows)} more")


def _print_layers(blueprint: Blueprint) -> None:
    largest = sorted(blueprint.layers, key=lambda layer: -layer.gradient_norm)
    rows = [
        (row.id, _number(row.gradient_norm), _number(row.alpha), _number(row.gamma), _number(row.k_star))
        for row in largest
    ]
    _print_table(("layer", "gradient_norm", "alpha", "gamma", "k_star"), rows[:SHOWN_LAYERS], of=len(rows))


def _print_changed(version: VersionSummary, as_json: bool) -> None:
    if as_json:
        _print_json(version)
        return
    checkpoint = format_checkpoint(version.training_checkpoint)
    state = f"is yanked: {_yanked(version)}" if version.yanked else "is no longer yanked"
    _say(f"{version.model_id} at {checkpoint} version {version.version} {state}")


def _print_aliases(aliases: list[Alias], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        _print_json(aliases[0] if one else aliases)
        return
    rows = [
        (alias.name, format_checkpoint(alias.training_checkpoint), alias.version, alias.revision, alias.digest)
        for alias in aliases
    ]
    _print_table(("alias", "checkpoint", "version", "revision", "digest"), rows)


def _identity(blueprint: Blueprint) -> dict[str, Any]:
    return {
        "model_id": blueprint.model_id,
        "training_checkpoint": blueprint.training_checkpoint,
        "version": blueprint.version,
        "digest": blueprint.digest,
        "lab": blueprint.lab,
    }


def _yanked(version: VersionSummary) -> str:
    return version.yanked_reason or "yes"


def _checkpoint(checkpoint: float | None) -> str:
    return "" if checkpoint is None else format_checkpoint(checkpoint)


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
