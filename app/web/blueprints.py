"""The page of one blueprint: its layers as pictures and as a table, where it comes from, how to fetch it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.api import representations
from app.api.dependencies import CheckpointPath, CurrentSettings, DigestPath, LabQuery, Session, VersionNumber
from app.api.representations import CSV, JSON, Representation
from app.registry import blueprints, catalog, evidence
from app.registry.blueprints import Found
from app.registry.versions import get_version
from app.web import drawings, pictures
from app.web.drawings import Bar
from app.web.layer_tables import Column, Order, Ordered, arrange, domain_columns
from app.web.rendering import in_thread, render
from app.web.session import Viewer
from gradient_blueprints.errors import BlueprintNotFound, NotFound
from gradient_blueprints.models import Blueprint, Layer, format_checkpoint

router = APIRouter(include_in_schema=False)
_VERSIONS_SHOWN = 20
_DOMAINS_SHOWN = 6

_COLUMNS = [
    Column("id", "Layer", lambda layer: layer.id, "text"),
    Column("kind", "Kind", lambda layer: layer.kind and layer.kind.replace("_", " "), "text"),
    Column("depth", "Depth", lambda layer: layer.depth, "count", about="block index"),
    Column(
        "gradient_norm",
        "Gradient norm",
        lambda layer: layer.gradient_norm,
        interval=lambda layer: layer.gradient_norm_ci,
        drawn=True,
        about="norm of the batch gradient over the batches, with its confidence interval",
    ),
    Column(
        "alpha",
        "α",
        lambda layer: layer.alpha,
        interval=lambda layer: layer.alpha_ci,
        about="rank-size exponent of the coordinates' magnitudes, with its confidence interval",
    ),
    Column("gamma", "γ", lambda layer: layer.gamma, about="1/(1 + α)"),
    Column("k_star", "k*", lambda layer: layer.k_star, "percent", about="fraction of the parameters worth updating"),
    Column("parameters", "Parameters", lambda layer: layer.parameters, "count"),
    Column(
        "example_norm", "Example norm", lambda layer: layer.example_norm, about="mean norm of one example's gradient"
    ),
    Column("signal", "Signal", lambda layer: layer.signal, about="norm of the mean gradient, sampling noise taken out"),
    Column("spread", "Spread", lambda layer: layer.spread, about="trace of the covariance of the examples' gradients"),
    Column(
        "first_order",
        "First order",
        lambda layer: layer.first_order,
        "signed",
        about="cross-validated decrease of the loss by one step",
    ),
]


@router.get("/models/{model_id:model}/checkpoints/{checkpoint}")
async def newest_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    order: Ordered,
    model_id: str,
    checkpoint: CheckpointPath,
    lab: LabQuery = None,
) -> Response:
    """What a fetch answers: the owner's newest version that is not yanked, or that of `lab`."""
    found = await blueprints.resolve(session, model_id, checkpoint, lab=lab)
    return await _page(request, session, found, order)


@router.get("/models/{model_id:model}/checkpoints/{checkpoint}/versions/{version}")
async def version_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    order: Ordered,
    model_id: str,
    checkpoint: CheckpointPath,
    version: VersionNumber,
) -> Response:
    found = await blueprints.resolve(session, model_id, checkpoint, version=version)
    return await _page(request, session, found, order)


@router.get("/blueprints/{digest}")
async def digest_page(
    request: Request, session: Session, viewer: Viewer, order: Ordered, digest: DigestPath
) -> Response:
    return await _page(request, session, await blueprints.resolve_digest(session, digest), order)


async def _page(request: Request, session: AsyncSession, found: Found, order: Order) -> Response:
    stored = await representations.read_document(request.app.state.documents, session, found)
    version = await get_version(session, found.model_id, found.checkpoint, found.version)
    others = await catalog.list_versions(
        session, found.model_id, found.checkpoint, lab=None, limit=_VERSIONS_SHOWN, cursor=None
    )
    newest = await _is_newest(session, found)
    told = await evidence.summarize(session, found.model_id)

    def rendered() -> Response:
        blueprint = Blueprint.from_json(stored.body)
        return render(
            request,
            "blueprint.html",
            blueprint=blueprint,
            version=version.summary,
            others=others,
            newest=newest,
            warnings=_by_code(stored.warnings),
            told=[domain for domain in told.domains if domain.digest == found.digest_text],
            window_days=told.window_days,
            table=arrange("layers", _columns(blueprint), blueprint.layers, order, first=("gradient_norm", True)),
            summary=_summary(blueprint),
            public=request.app.state.settings.public_reads,
        )

    return await in_thread(session, rendered)  # a large document takes a while to parse and to write out


async def _is_newest(session: AsyncSession, found: Found) -> bool:
    """Whether a fetch of this lab's blueprint answers this version, or none because the lab yanked them all."""
    try:
        newest = await blueprints.resolve(session, found.model_id, found.checkpoint, lab=found.lab)
    except BlueprintNotFound:
        return True
    return newest.version == found.version


def _by_code(warnings: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """A dubious profile has the same warning for most of its layers."""
    gathered: dict[str, list[dict[str, str]]] = {}
    for warning in warnings:
        gathered.setdefault(warning["code"], []).append(warning)
    return gathered


def _columns(blueprint: Blueprint) -> list[Column]:
    names = dict.fromkeys(name for layer in blueprint.layers for name in layer.domain_tags or ())

    def weight(layer: Layer, name: str) -> float | None:
        given: float | None = (layer.domain_tags or {}).get(name)
        return given

    return _COLUMNS + domain_columns(names, weight, most=_DOMAINS_SHOWN)


def _summary(blueprint: Blueprint) -> dict[str, Any]:
    """What the pictures show, in words and numbers."""
    layers = sorted(blueprint.layers, key=lambda layer: -layer.gradient_norm)
    top = layers[: max(1, len(layers) // 10)]
    unit = layers[0].gradient_norm  # squares of the norms themselves may leave float64
    squares = [(layer.gradient_norm / unit) ** 2 for layer in layers] if unit > 0 else []
    counts = [layer.parameters for layer in layers]
    return {
        "parameters": None if None in counts else sum(count or 0 for count in counts),
        "top": len(top),
        "top_share": sum(squares[: len(top)]) / sum(squares) if squares else None,
        "largest": layers[0],
        "smallest": layers[-1],
        "intervals": sum(layer.gradient_norm_ci is not None for layer in layers),
        "has_heatmap": _has_heatmap(layers),
        "has_retained_mass": any(layer.retained_mass for layer in layers),
        "drawn": min(len(layers), drawings.MOST_POINTS),
    }


# --- the document itself


@router.get("/blueprints/{digest}/{form}")
async def download(
    request: Request,
    session: Session,
    viewer: Viewer,
    settings: CurrentSettings,
    digest: DigestPath,
    form: Literal["json", "csv"],
) -> Response:
    """The bytes to keep, for who has a browser and no key at hand."""
    found = await blueprints.resolve_digest(session, digest)
    stored = await representations.read_document(request.app.state.documents, session, found)
    representation = Representation(CSV if form == "csv" else JSON, "identity")
    body = await in_thread(session, lambda: representations.encode(stored.body, representation))
    name = f"{found.model_id.replace('/', '-')}-{format_checkpoint(found.checkpoint)}-v{found.version}.{form}"
    return Response(
        body,
        media_type=representation.media_type,
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": representations.immutable(settings),
        },
    )


# --- its pictures


@router.get("/blueprints/{digest}/pictures/{picture}")
async def draw(
    request: Request,
    session: Session,
    viewer: Viewer,
    settings: CurrentSettings,
    digest: DigestPath,
    picture: Literal["norms.svg", "heatmap.svg", "retained-mass.svg"],
    narrow: bool = False,
) -> Response:
    found = await blueprints.resolve_digest(session, digest)
    stored = await representations.read_document(request.app.state.documents, session, found)

    def drawn() -> bytes:
        layers = Blueprint.from_json(stored.body).layers
        match picture:
            case "norms.svg":
                return drawings.draw_norms(
                    drawings.largest(map(_bar, range(len(layers)), layers)), "gradient norm", narrow=narrow
                )
            case "heatmap.svg":
                if not _has_heatmap(layers):
                    raise NotFound("A heatmap needs layers with a kind and a depth, and not too many blocks.")
                return drawings.draw_heatmap(tuple(map(_bar, range(len(layers)), layers)), narrow=narrow)
            case "retained-mass.svg":
                curves = tuple((layer.kind, layer.retained_mass) for layer in layers if layer.retained_mass)
                if not curves:
                    raise NotFound("No layer of this blueprint says what its largest coordinates retain.")
                return drawings.draw_retained_mass(curves, narrow=narrow)

    return await pictures.answer(session, drawn, cache_control=representations.immutable(settings))


def _has_heatmap(layers: Iterable[Layer]) -> bool:
    blocks = {layer.depth for layer in layers if layer.kind is not None and layer.depth is not None}
    return 0 < len(blocks) <= drawings.MOST_BLOCKS


def _bar(position: int, layer: Layer) -> Bar:
    return Bar.of(position, layer, layer.gradient_norm_ci)
