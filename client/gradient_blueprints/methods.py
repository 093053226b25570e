"""The methods of both clients on blueprints, models, aliases and accounts, each written once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gradient_blueprints.cache import Question, Remembered, digest_of_file
from gradient_blueprints.calls import (
    Checkpointish,
    built,
    checkpoint_path,
    checkpoint_text,
    digest_text,
    json_bytes,
    listing,
    method,
    model_path,
    new_idempotency_key,
    some,
    version_text,
)
from gradient_blueprints.canonical import digest_of
from gradient_blueprints.downloads import Downloading
from gradient_blueprints.errors import (
    ApiError,
    BlobNotFound,
    ConfigurationError,
    ConnectionFailed,
    DigestMismatch,
    OfflineMiss,
    RateLimited,
    ServiceUnavailable,
    UnexpectedAnswer,
)
from gradient_blueprints.models import (
    BLUEPRINT_FILE,
    DEFER_BUILD,
    Alias,
    AliasHistory,
    AliasMove,
    AliasPage,
    AliasTarget,
    AuditEntry,
    AuditPage,
    BlobSummary,
    Blueprint,
    CheckpointPage,
    CheckpointSummary,
    Comparison,
    IssuedKey,
    Key,
    KeyPage,
    Lab,
    LabPage,
    ModelPage,
    ModelSummary,
    NewKey,
    NewLab,
    Publication,
    Scope,
    VersionPage,
    VersionSummary,
    Warning_,
    WhoAmI,
    YankReason,
)
from gradient_blueprints.transport import (
    Answer,
    Request,
    Steps,
    Stream,
    Work,
)

FACTORS = "factors.safetensors"
WARNINGS = TypeAdapter(tuple[Warning_, ...], config=ConfigDict(defer_build=DEFER_BUILD))

logger = logging.getLogger("gradient_blueprints")


class RegistryMethods(Downloading):
    """Everything but jobs."""

    # --- blueprints

    @method
    def fetch_blueprint(
        self,
        model_id: str,
        checkpoint: Checkpointish,
        *,
        version: int | None = None,
        digest: str | None = None,
        lab: str | None = None,
        nearest: bool = False,
    ) -> Steps[Blueprint]:
        """The blueprint of a model at a training checkpoint: its owner's newest, unless you ask otherwise.

        `version` or `digest` pins one for ever; once cached it is answered without a connection. `lab`
        asks for another lab's newest ("*": anyone's). `nearest` takes the nearest checkpoint when there
        is none at exactly this one; `training_checkpoint` of the answer tells which.

            blueprint = client.fetch_blueprint("foundation-7b", 0.8)
            blueprint.version, blueprint.digest, blueprint.layer("attn.0").k_star

        Raises ModelNotFound, CheckpointNotFound (`extensions["checkpoints"]` lists those that exist),
        BlueprintNotFound, and OfflineMiss when offline and not cached.
        """
        if digest is not None:
            if version is not None or lab is not None or nearest:
                raise ConfigurationError("A digest names one blueprint: leave out version, lab and nearest.")
            blueprint = yield from self._fetch(f"/v1/blueprints/{digest_text(digest)}", {}, pinned=True)
            asked = (model_id, checkpoint_text(checkpoint))
            if asked != (blueprint.model_id, checkpoint_text(blueprint.training_checkpoint)):
                raise DigestMismatch(f"{digest} is {blueprint!r}, not a blueprint of {asked[0]} at {asked[1]}.")
            return blueprint
        path = checkpoint_path(model_id, checkpoint, "blueprint")
        if version is not None:
            if nearest:
                raise ConfigurationError("A version is of one checkpoint: leave out nearest.")
            return (yield from self._fetch(path, some(version=version_text(version)), pinned=True, lab=lab))
        query = some(lab=lab) | ({"nearest": "true"} if nearest else {})
        return (yield from self._fetch(path, query, pinned=False))

    @method
    def fetch_by_digest(self, digest: str) -> Steps[Blueprint]:
        """The blueprint with that digest, whatever its model; once cached it is answered without a connection."""
        return (yield from self._fetch(f"/v1/blueprints/{digest_text(digest)}", {}, pinned=True))

    @method
    def fetch_by_alias(self, model_id: str, name: str) -> Steps[Blueprint]:
        """The blueprint that a movable name points to now."""
        return (yield from self._fetch(model_path(model_id, "aliases", name, "blueprint"), {}, pinned=False))

    def _fetch(self, path: str, query: Mapping[str, str], *, pinned: bool, lab: str | None = None) -> Steps[Blueprint]:
        question = Question.of(self.url, path, query)
        known = self.cache.recall(question)
        content = self.cache.read(known.digest) if known else None
        if known and content and pinned and lab in {None, "*", known.lab}:
            return _blueprint(known, content)
        if self.offline:
            if known and content and not pinned:
                logger.warning(
                    "Offline: %s is answered as it was last seen, %s, version %d; there may be a newer one.",
                    path,
                    known.seen_at.strftime("%Y-%m-%d %H:%M UTC"),
                    known.version,
                )
                return _blueprint(known, content)
            raise OfflineMiss(
                f"{path}{''.join(f' {name}={value}' for name, value in query.items())} of {self.url} is not in "
                f"{self.cache}, and this client is offline. Fetch it once while connected, "
                "with the same cache (BLUEPRINTS_CACHE) and the same arguments, or unset BLUEPRINTS_OFFLINE."
            )
        headers = {"Accept": "application/json"}
        if known and content and known.etag:
            headers["If-None-Match"] = known.etag
        try:
            answer = yield from self._exchange(Request("GET", path, dict(query) | some(lab=lab), headers))
        except ConnectionFailed as failure:
            if known and content:
                failure.add_note(
                    f"The cache holds version {known.version}, seen {known.seen_at}; offline=True answers it."
                )
            raise
        if answer.status == 304 and known and content:
            fresh = _remembered(question, answer, known)
            if fresh.digest != known.digest:
                raise answer.unexpected(f"though {known.digest} was asked about, and {fresh.digest} is the answer")
        else:
            fresh, content = _remembered(question, answer, None), answer.content
            if digest_of(content) != fresh.digest:
                raise answer.unexpected(f"with other bytes than those of the digest {fresh.digest} that it names")
        blueprint = _blueprint(fresh, content, answer)
        if answer.status != 304:
            self.cache.store(fresh.digest, content)
        self._remember(fresh, blueprint)
        return blueprint

    def _remember(self, answered: Remembered, blueprint: Blueprint) -> None:
        """Keep an answer under its question, and under the version and the digest that it told."""
        pinned = checkpoint_path(blueprint.model_id, blueprint.training_checkpoint, "blueprint")
        questions = (
            answered.question,
            Question.of(self.url, pinned, some(version=answered.version)),
            Question.of(self.url, f"/v1/blueprints/{answered.digest}"),
        )
        for question in dict.fromkeys(questions):
            self.cache.remember(answered.model_copy(update={"question": question}))

    @method
    def publish_blueprint(
        self, document: Blueprint | Mapping[str, Any] | str | bytes | Path, *, idempotency_key: str | None = None
    ) -> Steps[Publication]:
        """Publish a document as the next version of its model and checkpoint.

        `document` is a Blueprint, plain data, the path of a .json or .csv file (or of a folder with
        gradient_blueprint.json), or the text of either. The same bytes published again answer the
        version that they have, with `created` False, so that repeating a publish is safe.

            publication = client.publish_blueprint("blueprint.json")
            publication.version, publication.warnings

        Raises InvalidDocument, whose `errors` point to the places, MissingBlob, PermissionDenied,
        and FileNotFoundError.
        """
        content, media_type = _document(document)
        headers = {"Content-Type": media_type, "Idempotency-Key": idempotency_key or new_idempotency_key()}
        answer = yield from self._exchange(Request("POST", "/v1/blueprints", {}, headers, content))
        publication = answer.parse(Publication)
        if isinstance(document, Blueprint) and document.digest == publication.digest:
            self.cache.store(publication.digest, document.to_canonical_bytes())
            question = Question.of(self.url, f"/v1/blueprints/{publication.digest}")
            self._remember(
                Remembered(
                    question=question,
                    digest=publication.digest,
                    version=publication.version,
                    lab=publication.lab,
                    warnings=publication.warnings,
                    seen_at=datetime.now(UTC),
                ),
                document,
            )
        return publication

    @method
    def compare_blueprints(
        self,
        model_id: str,
        base: Checkpointish | tuple[Checkpointish, int],
        other: Checkpointish | tuple[Checkpointish, int],
        *,
        top: int | None = None,
        lab: str | None = None,
    ) -> Steps[Comparison]:
        """What changed from one checkpoint (or `(checkpoint, version)`, or "0.8@2") to another, layer by layer."""
        query = some(base=_side(base), other=_side(other), top=top, lab=lab)
        return (yield from self._read(Comparison, model_path(model_id, "compare"), query))

    # --- models and versions

    @listing
    def list_models(self, query: str | None = None, *, limit: int | None = None) -> Stream[ModelSummary]:
        """Every model, or those whose id contains `query`."""
        yield from self._pages(ModelPage, "models", "/v1/models", some(q=query), limit)

    @method
    def get_model(self, model_id: str) -> Steps[ModelSummary]:
        """One model: its owner, and how much there is of it."""
        return (yield from self._read(ModelSummary, model_path(model_id)))

    @listing
    def list_checkpoints(self, model_id: str, *, limit: int | None = None) -> Stream[CheckpointSummary]:
        """The checkpoints of a model that have a version."""
        yield from self._pages(CheckpointPage, "checkpoints", model_path(model_id, "checkpoints"), {}, limit)

    @listing
    def list_versions(
        self, model_id: str, checkpoint: Checkpointish, *, lab: str | None = None, limit: int | None = None
    ) -> Stream[VersionSummary]:
        """The versions at a checkpoint, newest first, yanked ones among them."""
        path = checkpoint_path(model_id, checkpoint, "versions")
        yield from self._pages(VersionPage, "versions", path, some(lab=lab), limit)

    @method
    def yank_version(
        self, model_id: str, checkpoint: Checkpointish, version: int, *, reason: str
    ) -> Steps[VersionSummary]:
        """Take one of your versions out of resolution; who pinned it still gets it, with a warning."""
        path = checkpoint_path(model_id, checkpoint, "versions", version_text(version), "yank")
        return (yield from self._write(VersionSummary, "POST", path, built(YankReason, reason=reason)))

    @method
    def unyank_version(self, model_id: str, checkpoint: Checkpointish, version: int) -> Steps[VersionSummary]:
        """Put a yanked version back."""
        path = checkpoint_path(model_id, checkpoint, "versions", version_text(version), "unyank")
        return (yield from self._write(VersionSummary, "POST", path))

    # --- aliases

    @method
    def set_alias(
        self, model_id: str, name: str, checkpoint: Checkpointish, version: int, *, if_revision: int | None = None
    ) -> Steps[Alias]:
        """Point a movable name of your model to a version.

        `if_revision` makes it a compare-and-set: PreconditionFailed when the alias is no longer at the
        revision that you read, and 0 for an alias that must not exist yet.
        """
        target = built(AliasTarget, training_checkpoint=float(checkpoint_text(checkpoint)), version=version)
        path = model_path(model_id, "aliases", name)
        return (yield from self._write(Alias, "PUT", path, target, headers=_if_revision(if_revision)))

    @method
    def get_alias(self, model_id: str, name: str) -> Steps[Alias]:
        """Where a movable name points, and its revision."""
        return (yield from self._read(Alias, model_path(model_id, "aliases", name)))

    @method
    def delete_alias(self, model_id: str, name: str, *, if_revision: int | None = None) -> Steps[None]:
        """Remove a movable name; its history stays."""
        path = model_path(model_id, "aliases", name)
        yield from self._exchange(Request("DELETE", path, {}, _if_revision(if_revision), repeatable=False))

    @listing
    def list_aliases(self, model_id: str, *, limit: int | None = None) -> Stream[Alias]:
        """The movable names of a model."""
        yield from self._pages(AliasPage, "aliases", model_path(model_id, "aliases"), {}, limit)

    @listing
    def alias_history(self, model_id: str, name: str, *, limit: int | None = None) -> Stream[AliasMove]:
        """Where a movable name has pointed."""
        yield from self._pages(AliasHistory, "moves", model_path(model_id, "aliases", name, "history"), {}, limit)

    # --- attachments

    @method
    def upload_blob(self, content: str | Path | bytes) -> Steps[BlobSummary]:
        """Put a file (or bytes) into the registry under its digest, streamed; what is there already is not sent."""
        source = content if isinstance(content, bytes) else Path(content)
        if isinstance(source, Path):
            digest = yield Work(lambda: digest_of_file(source))
            size = source.stat().st_size
        else:
            digest, size = digest_of(source), len(source)
        path = _blob_path(digest)
        try:
            yield from self._exchange(Request("HEAD", path))
        except (RateLimited, ServiceUnavailable):
            raise
        except (
            ApiError,
            UnexpectedAnswer,
        ):  # the answer to a HEAD has no body that could tell why; that to the PUT will
            headers = {"Content-Type": "application/octet-stream"}
            answer = yield from self._exchange(Request("PUT", path, {}, headers, source), silence=self.timeout)
            return answer.parse(BlobSummary)
        return BlobSummary(digest=digest, size=size, created=False)

    @method
    def fetch_blob(self, digest: str, path: str | Path | None = None) -> Steps[Path]:
        """The file with that digest: at `path` when you give one, else in the cache, not to be written to.

        Streamed, resumed where a connection broke off, and in place only once its digest is verified.
        """
        return (yield from self._fetch_file(_blob_path(digest), digest, None if path is None else Path(path)))

    @method
    def fetch_factors(self, blueprint: Blueprint, path: str | Path | None = None) -> Steps[Path]:
        """The attachment factors.safetensors of a blueprint as a file, as `fetch_blob` gives it."""
        for attachment in blueprint.attachments or ():
            if attachment.name == FACTORS:
                digest = attachment.digest
                return (yield from self._fetch_file(_blob_path(digest), digest, None if path is None else Path(path)))
        raise BlobNotFound(f"{blueprint!r} has no attachment {FACTORS}; profile it with factors to get them.")

    # --- labs, keys, audit

    @method
    def whoami(self) -> Steps[WhoAmI]:
        """The lab and the scopes of your key."""
        return (yield from self._read(WhoAmI, "/v1/whoami"))

    @method
    def create_lab(self, name: str) -> Steps[Lab]:
        """Add a lab (scope admin)."""
        return (yield from self._write(Lab, "POST", "/v1/labs", built(NewLab, name=name)))

    @listing
    def list_labs(self, *, limit: int | None = None) -> Stream[Lab]:
        """Every lab (scope admin)."""
        yield from self._pages(LabPage, "labs", "/v1/labs", {}, limit)

    @method
    def create_key(
        self, lab: str, scopes: Iterable[Scope | str], *, name: str = "", expires_at: datetime | None = None
    ) -> Steps[IssuedKey]:
        """Issue a key (scope admin); `secret` of the answer is told this once."""
        body = built(NewKey, lab=lab, scopes=tuple(scopes), name=name, expires_at=expires_at)
        return (yield from self._write(IssuedKey, "POST", "/v1/keys", body))

    @listing
    def list_keys(self, *, limit: int | None = None) -> Stream[Key]:
        """Every key, without its secret (scope admin)."""
        yield from self._pages(KeyPage, "keys", "/v1/keys", {}, limit)

    @method
    def revoke_key(self, key_id: int) -> Steps[Key]:
        """End a key at once (scope admin)."""
        return (yield from self._write(Key, "POST", f"/v1/keys/{int(key_id)}/revoke"))

    @listing
    def list_audit(self, *, limit: int | None = None) -> Stream[AuditEntry]:
        """Who changed what, newest first (scope admin)."""
        yield from self._pages(AuditPage, "entries", "/v1/audit", {}, limit)


# --- reading answers and arguments


def _remembered(question: Question, answer: Answer, known: Remembered | None) -> Remembered:
    """What the headers of a fetch tell; a 304 may leave out what has not changed."""
    headers = answer.headers
    if known is not None and "blueprint-version" not in headers:
        return known.model_copy(update={"seen_at": datetime.now(UTC)})
    try:
        stated = headers.get("blueprint-warning")
        return Remembered(
            question=question,
            digest=headers["blueprint-digest"],
            version=int(headers["blueprint-version"]),
            lab=headers["blueprint-lab"],
            etag=headers.get("etag"),
            warnings=WARNINGS.validate_json(stated, extra="ignore") if stated else (),
            seen_at=datetime.now(UTC),
        )
    except (KeyError, ValueError) as error:
        raise answer.unexpected(f"without usable Blueprint-* headers ({error})") from None


def _blueprint(known: Remembered, content: bytes, answer: Answer | None = None) -> Blueprint:
    try:
        document = Blueprint.from_json(content)
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        raise UnexpectedAnswer(
            f"{known.digest} is not a blueprint that this version can read "
            f"({'.'.join(map(str, fault['loc']))}: {fault['msg']}). Update: pip install -U gradient-blueprints"
        ) from None
    publication = Publication(
        model_id=document.model_id,
        training_checkpoint=document.training_checkpoint,
        version=known.version,
        digest=known.digest,
        created=False,
        lab=known.lab,
        warnings=known.warnings,
    )
    return document.published_as(publication)


def _document(document: Blueprint | Mapping[str, Any] | str | bytes | Path) -> tuple[bytes, str]:
    """The bytes to publish, and their media type."""
    match document:
        case Blueprint():
            return document.to_canonical_bytes(), "application/json"
        case Mapping():
            return json_bytes(document), "application/json"
        case bytes():
            content = document
        case str() if document.lstrip().startswith("{") or "\n" in document:
            content = document.encode()
        case str() | Path():
            path = Path(document)
            if path.is_dir():
                path = path / BLUEPRINT_FILE
            content = path.read_bytes()
            if path.suffix.lower() == ".csv":
                return content, "text/csv"
        case _:
            raise ConfigurationError(
                f"A {type(document).__name__} cannot be published: give a Blueprint, data, text or a path."
            )
    is_json = content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"["))
    return content, "application/json" if is_json else "text/csv"


def _blob_path(digest: str) -> str:
    return f"/v1/blobs/{digest_text(digest)}"


def _side(side: Checkpointish | tuple[Checkpointish, int]) -> str:
    if isinstance(side, tuple):
        checkpoint, version = side
        return f"{checkpoint_text(checkpoint)}@{version_text(version)}"
    checkpoint, at, pinned = str(side).partition("@")
    if at and not pinned.isdigit():
        raise ConfigurationError(f"{side!r} is neither a checkpoint nor CHECKPOINT@VERSION, such as 0.8@2.")
    return checkpoint_text(checkpoint) + at + pinned


def _if_revision(revision: int | None) -> dict[str, str]:
    if revision is None:
        return {}
    return {"If-Match": f'"{int(revision)}"'} if revision else {"If-None-Match": "*"}
