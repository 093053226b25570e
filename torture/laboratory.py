"""One client under torture: a lab that works through the SDK and writes down what it wanted and what it was told."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradient_blueprints import Blueprint, Client
from gradient_blueprints.canonical import digest_of
from gradient_blueprints.errors import ApiError, ConnectionFailed, InternalError
from torture.journal import Journal, Outcome
from torture.schedule import Schedule, StepKind

TIMEOUT = 20.0  # seconds that the SDK insists on one call
CHECKPOINTS = (0.2, 0.5, 0.8, 1.0)
MODELS = 3  # on which all labs publish
COMMON_DOCUMENTS = 12  # which several labs publish to the byte
MOST_BLOB_BYTES = 60_000  # the store must have room for all of a run
MOST_FILE_BYTES = 100_000

Answer = dict[str, Any]


@dataclass(frozen=True)
class Attempted:
    """A document that was sent, whatever became of it."""

    document: dict[str, Any]
    digest: str
    idempotency_key: str


@dataclass
class Known:
    """What the lab remembers of what it was told; steps choose from it."""

    attempted: list[Attempted] = field(default_factory=list)
    versions: list[tuple[str, float, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    yanked: list[tuple[str, float, int]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    alias_revision: int | None = 0


class Laboratory:
    """Performs the steps of one client from `began`, a moment of time.monotonic(), for as long as the schedule says."""

    def __init__(
        self, schedule: Schedule, number: int, url: str, key: str, sources: Path, folder: Path, began: float
    ) -> None:
        self.lab = f"lab-{number}"
        self._schedule = schedule
        self._number = number
        self._client = Client(url, api_key=key, cache=False, offline=False, timeout=TIMEOUT)
        self._public = Client(url, cache=False, offline=False, timeout=TIMEOUT)
        self._sources = sources
        self._folder = folder / f"uploads-{number}"
        self._folder.mkdir()
        self._journal = Journal(folder, number)
        self._began = began
        self._known = Known()
        self._performed: dict[StepKind, Callable[[int, random.Random], None]] = {
            StepKind.PUBLISH: self._publish_new,
            StepKind.PUBLISH_AGAIN: self._publish_again,
            StepKind.PUBLISH_ATTACHED: self._publish_attached,
            StepKind.PUBLISH_INVALID: self._publish_invalid,
            StepKind.FETCH_NEWEST: self._fetch_newest,
            StepKind.FETCH_PUBLIC: self._fetch_public,
            StepKind.FETCH_DIGEST: self._fetch_digest,
            StepKind.LIST_VERSIONS: self._list_versions,
            StepKind.YANK: self._yank,
            StepKind.UNYANK: self._unyank,
            StepKind.MOVE_ALIAS: self._move_alias,
            StepKind.AGGREGATE: self._aggregate,
            StepKind.UPLOAD_FILE: self._upload_file,
            StepKind.DELETE_FILE: self._delete_file,
            StepKind.CANCEL_JOB: self._cancel_job,
            StepKind.SUBMIT_JOB: self._submit_job,
        }

    def run(self) -> None:
        jobs = list(self._schedule.jobs[self._number])
        for number, kind, draw in self._schedule.steps(self._number):
            passed = time.monotonic() - self._began
            if passed > self._schedule.seconds and not jobs:
                break
            if jobs and passed >= jobs[0]:  # a fault may have held us up until after the end
                jobs.pop(0)
                kind = StepKind.SUBMIT_JOB
            self._performed[kind](number, draw)
        self._client.close()
        self._public.close()
        self._journal.close()

    def _try(self, number: int, kind: StepKind, call: Callable[[], Answer], **arguments: Any) -> tuple[Outcome, Answer]:
        """One step, its intention written down before and its outcome after."""
        self._journal.write(client=self._number, number=number, kind=kind, arguments={"lab": self.lab, **arguments})
        answer: Answer = {}
        error: str | None = None
        try:
            answer = call()
            outcome = Outcome.ACKNOWLEDGED
        except ConnectionFailed as failure:
            outcome, error = Outcome.UNKNOWN, str(failure)
        except ApiError as refusal:
            outcome = Outcome.REFUSED if refusal.status < 500 else Outcome.UNKNOWN
            outcome = Outcome.BROKEN if type(refusal) is InternalError else outcome
            error = f"{refusal.status} {refusal.code}: {refusal}"
        except Exception as broken:  # whatever else the SDK raises is a finding
            outcome, error = Outcome.BROKEN, f"{type(broken).__name__}: {broken}"
        self._journal.write(number=number, outcome=outcome, answer=answer, error=error)
        return outcome, answer

    # --- publishing

    def _publish_new(self, number: int, draw: random.Random) -> None:
        if draw.random() < 0.2:
            document = _common_document(self._schedule.seed, draw.randrange(COMMON_DOCUMENTS))
        else:
            document = self._own_document(number, draw)
        self._publish(number, StepKind.PUBLISH, document)

    def _own_document(self, number: int, draw: random.Random) -> dict[str, Any]:
        own = draw.random() < 0.25
        model = f"torture/{self.lab}" if own else f"torture/model-{draw.randrange(MODELS)}"
        return _document(draw, model, mark=f"{self.lab}, step {number}")

    def _publish_attached(self, number: int, draw: random.Random) -> None:
        document = self._own_document(number, draw)
        content = draw.randbytes(draw.randrange(1, MOST_BLOB_BYTES))
        attachment = {"media_type": "application/octet-stream", "digest": digest_of(content), "size": len(content)}
        document["attachments"] = [{"name": "notes.dat", **attachment}]
        self._publish(number, StepKind.PUBLISH_ATTACHED, document, content)

    def _publish_again(self, number: int, draw: random.Random) -> None:
        """The same bytes, as somebody does who heard no answer: with the same idempotency key, or a new one."""
        if not self._known.attempted:
            return
        attempted = draw.choice(self._known.attempted)
        key = attempted.idempotency_key if draw.random() < 0.5 else None
        if "attachments" not in attempted.document:
            self._publish(number, StepKind.PUBLISH_AGAIN, attempted.document, idempotency_key=key)

    def _publish(
        self,
        number: int,
        kind: StepKind,
        document: dict[str, Any],
        attached: bytes | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        blueprint = Blueprint.from_dict(document)
        key = idempotency_key or f"{self.lab}-{number}"

        def publish() -> Answer:
            if attached is not None:
                self._client.upload_blob(attached)
            published = self._client.publish_blueprint(blueprint, idempotency_key=key)
            return {"version": published.version, "digest": published.digest, "lab": published.lab}

        named = {"model": blueprint.model_id, "checkpoint": blueprint.training_checkpoint, "digest": blueprint.digest}
        attachments = [item.digest for item in blueprint.attachments or ()]
        outcome, answer = self._try(number, kind, publish, **named, attachments=attachments)
        self._known.attempted.append(Attempted(document, blueprint.digest, key))
        if outcome is Outcome.ACKNOWLEDGED:
            self._known.versions.append((blueprint.model_id, blueprint.training_checkpoint, answer["version"]))
            self._known.digests.append(blueprint.digest)

    def _publish_invalid(self, number: int, draw: random.Random) -> None:
        """A document that the registry must refuse, whole: its last layer is wrong, or its attachment is not there."""
        document = self._own_document(number, draw)
        if draw.random() < 0.5:
            absent = {"media_type": "a/b", "digest": digest_of(draw.randbytes(9)), "size": 9}
            document["attachments"] = [{"name": "absent.dat", **absent}]
            content: Any = Blueprint.from_dict(document).to_canonical_bytes()
        else:
            document["layers"][-1]["gradient_norm"] = -1.0
            content = document
        self._try(
            number,
            StepKind.PUBLISH_INVALID,
            lambda: {"version": self._client.publish_blueprint(content).version},
            mark=document["extra"]["mark"],
        )

    # --- reading

    def _fetch_newest(self, number: int, draw: random.Random) -> None:
        """Of this lab, so that its journal alone tells what the answer may be; the client holds no cache."""
        if not self._known.versions:
            return
        model, checkpoint, _ = draw.choice(self._known.versions)

        def fetch() -> Answer:
            found = self._client.fetch_blueprint(model, checkpoint, lab=self.lab)
            return {"version": found.version, "digest": found.digest}

        self._try(number, StepKind.FETCH_NEWEST, fetch, model=model, checkpoint=checkpoint)

    def _fetch_public(self, number: int, draw: random.Random) -> None:
        """Of a model that this lab owns, as everybody sees it: answered from the API's memory where it can be."""
        if not (own := self._own_versions()):
            return
        model, checkpoint, _ = draw.choice(own)

        def fetch() -> Answer:
            found = self._public.fetch_blueprint(model, checkpoint)
            return {"version": found.version, "digest": found.digest}

        self._try(number, StepKind.FETCH_PUBLIC, fetch, model=model, checkpoint=checkpoint)

    def _own_versions(self) -> list[tuple[str, float, int]]:
        return [version for version in self._known.versions if version[0] == f"torture/{self.lab}"]

    def _fetch_digest(self, number: int, draw: random.Random) -> None:
        if not self._known.digests:
            return
        digest = draw.choice(self._known.digests)

        def fetch() -> Answer:
            found = self._client.fetch_by_digest(digest)
            return {"digest": digest_of(found.to_canonical_bytes())}

        self._try(number, StepKind.FETCH_DIGEST, fetch, digest=digest)

    def _list_versions(self, number: int, draw: random.Random) -> None:
        if not self._known.versions:
            return
        model, checkpoint, _ = draw.choice(self._known.versions)

        def names() -> Answer:
            found = self._client.list_versions(model, checkpoint)
            return {"versions": [[version.version, version.digest, version.lab] for version in found]}

        self._try(number, StepKind.LIST_VERSIONS, names, model=model, checkpoint=checkpoint)

    def _aggregate(self, number: int, draw: random.Random) -> None:
        model = f"torture/model-{draw.randrange(MODELS)}"

        def rows() -> Answer:
            found = self._client.aggregate_blueprints(model, versions="all")
            layers = Counter((row.digest, row.version, row.training_checkpoint) for row in found)
            return {"layers": [[*of, number] for of, number in layers.items()]}

        self._try(number, StepKind.AGGREGATE, rows, model=model)

    # --- versions and aliases

    def _yank(self, number: int, draw: random.Random) -> None:
        if not self._known.versions:
            return
        model, checkpoint, version = named = draw.choice(self._known.versions)
        self._try(
            number,
            StepKind.YANK,
            lambda: {"yanked": self._client.yank_version(model, checkpoint, version, reason="torture").yanked},
            model=model,
            checkpoint=checkpoint,
            version=version,
        )
        self._known.yanked.append(named)

    def _unyank(self, number: int, draw: random.Random) -> None:
        if not self._known.yanked:
            return
        model, checkpoint, version = draw.choice(self._known.yanked)
        self._try(
            number,
            StepKind.UNYANK,
            lambda: {"yanked": self._client.unyank_version(model, checkpoint, version).yanked},
            model=model,
            checkpoint=checkpoint,
            version=version,
        )

    def _move_alias(self, number: int, draw: random.Random) -> None:
        """Compare-and-set on a model that this lab alone publishes."""
        if not (own := self._own_versions()):
            return
        model, checkpoint, version = draw.choice(own)
        revision = self._known.alias_revision

        def move() -> Answer:
            moved = self._client.set_alias(model, "stable", checkpoint, version, if_revision=revision)
            return {"revision": moved.revision}

        outcome, answer = self._try(
            number, StepKind.MOVE_ALIAS, move, model=model, checkpoint=checkpoint, version=version, revision=revision
        )
        self._known.alias_revision = answer["revision"] if outcome is Outcome.ACKNOWLEDGED else None

    # --- files and jobs

    def _upload_file(self, number: int, draw: random.Random) -> None:
        name = f"text-{number}.txt"
        content = draw.randbytes(draw.randrange(1, MOST_FILE_BYTES))
        file = self._folder / name
        file.write_bytes(content)

        def upload() -> Answer:
            uploaded = self._client.upload_checkpoint_file(file, "torture/files", 0.5)
            return {"complete": uploaded.complete, "digest": uploaded.digest}

        self._try(number, StepKind.UPLOAD_FILE, upload, path=name, digest=digest_of(content))
        file.unlink()
        self._known.files.append(name)

    def _delete_file(self, number: int, draw: random.Random) -> None:
        if not self._known.files:
            return
        name = self._known.files.pop(draw.randrange(len(self._known.files)))

        def delete() -> Answer:
            self._client.delete_checkpoint_file("torture/files", 0.5, name)
            return {}

        self._try(number, StepKind.DELETE_FILE, delete, path=name)

    def _submit_job(self, number: int, draw: random.Random) -> None:
        """A job whose blueprint can be told from every other's: its note names the lab and the step."""
        note = f"{self.lab}, job of step {number}"
        shards = 2 if draw.random() < self._schedule.scale.sharded else 1

        def submit() -> Answer:
            job = self._client.submit_checkpoint(
                "torture/profiled",
                draw.choice(CHECKPOINTS),
                source=self._sources / "tiny",
                data={"general": self._sources / "general.txt"},
                notes=note,
                idempotency_key=f"{self.lab}-job-{number}",
                batches=2,
                batch_size=2,
                sequence_length=16,
                shards=shards,
                seed=draw.randrange(1_000),
            )
            return {"job": job.id}

        outcome, answer = self._try(number, StepKind.SUBMIT_JOB, submit, note=note, shards=shards)
        if outcome is Outcome.ACKNOWLEDGED:
            self._known.jobs.append(answer["job"])

    def _cancel_job(self, number: int, draw: random.Random) -> None:
        """Any job but the first, so that there is one that must succeed."""
        if not (jobs := self._known.jobs[1:]):
            return
        job = draw.choice(jobs)
        self._try(number, StepKind.CANCEL_JOB, lambda: {"state": self._client.cancel_job(job).state}, job=job)


def _document(draw: random.Random, model: str, *, mark: str) -> dict[str, Any]:
    layers = draw.choice((1, 3, 12, 60, 200))
    return {
        "model_id": model,
        "training_checkpoint": draw.choice(CHECKPOINTS),
        "layers": [
            {"id": f"block.{layer}.attn", "gradient_norm": draw.random(), "domain_tags": {"general": 1.0}}
            for layer in range(layers)
        ],
        "extra": {"mark": mark},
    }


def _common_document(seed: int, which: int) -> dict[str, Any]:
    draw = random.Random(f"{seed}/common/{which}")  # noqa: S311 - repeatable, no secret
    return _document(draw, f"torture/model-{draw.randrange(MODELS)}", mark=f"common {which}")
