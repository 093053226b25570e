"""One attempt at a job: a lease kept alive, a process that works, and a last word to the registry, whatever happens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path
from queue import Empty
from typing import Any, Literal

from gradient_blueprints import Blueprint, Client
from gradient_blueprints.errors import (
    ApiError,
    BlueprintsError,
    Conflict,
    ConnectionFailed,
    InternalError,
    JobFinished,
    JobNotFound,
    LeaseLost,
    PermissionDenied,
    RateLimited,
    ServiceUnavailable,
    Unauthenticated,
    UnexpectedAnswer,
)
from gradient_blueprints.models import Claim, JobOutcome, JobState, NewJob, Progress
from gradient_blueprints.tracing import span
from worker import metrics
from worker.child import Child, Fetched, Fetching, Specification
from worker.device import device_fault
from worker.folders import job_folder
from worker.settings import WorkerSettings
from worker.sources import needs_fetching
from worker.speaking import FAILED, FINISHED, MEMORY, PROGRESS

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
LONGEST_HEARTBEAT = 3.0  # seconds: a third of the lease, but a cancel must arrive within seconds however long that is
REPORT_SECONDS = 900.0  # how long a finished job's word is offered to a registry that does not answer
LONGEST_PAUSE = 15.0
CRASH_PAUSE = 5.0
PASSING = (ConnectionFailed, ServiceUnavailable, InternalError, UnexpectedAnswer, RateLimited)
REFUSED = (Unauthenticated, PermissionDenied)


class NotClaimed(Exception):
    """The job may still need this worker: its message must not be dropped."""


def work_on(job_id: str, settings: WorkerSettings, stopping: threading.Event) -> None:
    """Claim a job and bring it to an end; a job that is not to be had is somebody else's, and no error."""
    with _client(settings) as client:
        claim = _claim(client, job_id, stopping)
        if claim is None:
            return
        logger.info("job %s: part %d, lease %d", job_id, claim.part, claim.lease_token)
        attempt = Attempt(client, settings, claim, Lease(settings, claim), stopping)
        with _counted():
            attempt.run()
    if attempt.crashed:
        recover(settings, stopping)


def recover(settings: WorkerSettings, stopping: threading.Event) -> None:
    """After a crash, which this worker may be the cause of: others get the next job; it waits for its device."""
    stopping.wait(CRASH_PAUSE)
    while not stopping.is_set() and (fault := device_fault(settings.device)):
        logger.error("no job is taken: %s", fault)
        stopping.wait(LONGEST_PAUSE)


@contextmanager
def _counted() -> Iterator[None]:
    metrics.BUSY.set(1)
    try:
        yield
    finally:
        metrics.BUSY.set(0)
        metrics.DEVICE_MEMORY.clear()


def _client(settings: WorkerSettings, timeout: float = 60.0) -> Client:
    return Client(
        settings.url, api_key=settings.api_key.get_secret_value(), cache=False, offline=False, timeout=timeout
    )


def _claim(client: Client, job_id: str, stopping: threading.Event) -> Claim | None:
    pause = 0.5
    while not stopping.is_set():
        try:
            return client.claim_job(job_id)
        except (Conflict, JobNotFound) as gone:
            logger.info("job %s is not to be had: %s", job_id, gone)
            return None
        except PASSING as passing:
            logger.warning("job %s cannot be claimed now: %s", job_id, passing)
        except REFUSED as refused:
            logger.error("the registry refuses this worker's key: %s", refused)
            pause = LONGEST_PAUSE
        stopping.wait(pause)
        pause = min(LONGEST_PAUSE, pause * 2)
    raise NotClaimed(job_id)


class Lease:
    """Renews a lease in a thread of its own until it is lost or the job is over."""

    def __init__(self, settings: WorkerSettings, claim: Claim) -> None:
        self.lost = threading.Event()
        self.cancelling = threading.Event()
        self.progress: Progress | None = None
        self._claim = claim
        self._over = threading.Event()
        self._every = min(claim.lease_seconds / 3, LONGEST_HEARTBEAT)
        self._client = _client(settings, timeout=max(1.0, claim.lease_seconds / 3))
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._renew,), name="lease", daemon=True
        )  # with the ids that its lines are about

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._thread.join()
        self._client.close()

    def release(self) -> None:
        """The job has ended; there is nothing to renew any more."""
        self._over.set()

    def _renew(self) -> None:
        while not self._over.wait(self._every):
            try:
                answer = self._client.heartbeat_job(self._claim.job.id, self._claim.lease_token, self.progress)
            except (LeaseLost, JobFinished, JobNotFound) as gone:
                if not self._over.is_set():
                    logger.warning("job %s: %s", self._claim.job.id, gone)
                self.lost.set()
                return
            except BlueprintsError as error:
                # Not even a lease that ran out is proof that another has the job; the registry says so when it can.
                logger.warning("job %s: the lease could not be renewed: %s", self._claim.job.id, error)
            else:
                if answer.state is JobState.CANCELLING:
                    self.cancelling.set()


class Attempt:
    def __init__(
        self,
        client: Client,
        settings: WorkerSettings,
        claim: Claim,
        lease: Lease,
        stopping: threading.Event,
    ) -> None:
        self.crashed = False
        self._client = client
        self._settings = settings
        self._claim = claim
        self._lease = lease
        self._stopping = stopping
        self._limit = claim.job.options.time_limit
        self._deadline = time.monotonic() + self._limit

    def run(self) -> None:
        """Work on the job in a folder of its own. Whatever fails in that, the registry is told how it ended."""
        try:
            with self._lease, job_folder() as self._folder:
                self._work()
        except Conflict:  # the job is somebody else's, or over
            raise
        except Exception as error:
            logger.exception("job %s: the worker failed", self._claim.job.id)
            self._end("crashed", f"the worker failed: {type(error).__name__}: {error}")

    def _work(self) -> None:
        """Bring what lies elsewhere, work, hand in; what ends the attempt before that has been told by then."""
        shards = self._claim.job.options.shards
        merges = shards > 1 and self._claim.part == shards
        job = NewJob.model_validate({name: getattr(self._claim.job, name) for name in NewJob.model_fields})
        fetched: dict[str, Any] | None = {}
        if merges or needs_fetching(job):
            fetched = self._result_of(self._fetching(job, merges))
        if fetched is not None:
            result = self._result_of(self._specification(job, Fetched.model_validate(fetched)))
            if result is None:
                return
            if shards == 1 or merges:
                self._publish(result)
            else:
                self._hand_in(self._folder / result["state"])

    def _result_of(self, specification: Specification | Fetching) -> dict[str, Any] | None:
        name = "fetch sources" if isinstance(specification, Fetching) else "profile"
        with span(name), ExitStack() as spans:
            child = Child(specification)
            try:
                return self._watch(child, spans)
            finally:
                child.stop()

    def _fetching(self, job: NewJob, merges: bool) -> Fetching:
        settings = self._settings
        shards = self._claim.job.parts[: job.options.shards] if merges else ()
        return Fetching(
            job=job,
            job_id=self._claim.job.id,
            states=tuple(shard.digest for shard in shards if shard.digest is not None),
            lab=self._claim.job.lab,
            folder=self._folder,
            url=settings.url,
            api_key=settings.api_key.get_secret_value(),
            cache=settings.cache_folder,
            cache_bytes=settings.cache_bytes,
            allowed_buckets=settings.allowed_buckets,
            allowed_hub=settings.allowed_hub,
            hub_token=settings.hub_token and settings.hub_token.get_secret_value(),
            networks=tuple(map(str, settings.source_networks)),
            max_model_bytes=settings.max_model_bytes,
            max_text_bytes=settings.max_text_bytes,
        )

    def _specification(self, job: NewJob, fetched: Fetched) -> Specification:
        return Specification(
            job=job,
            fetched=fetched,
            part=self._claim.part,
            folder=self._folder,
            allowed_roots=self._settings.allowed_roots,
            device=self._settings.device,
            max_model_bytes=self._settings.max_model_bytes,
            max_text_bytes=self._settings.max_text_bytes,
        )

    def _watch(self, child: Child, spans: ExitStack) -> dict[str, Any] | None:
        """What the process comes to; None when something else ended the attempt, which has been said by then."""
        phase = ""
        memory = self._settings.max_memory_bytes
        while True:
            ended = child.ended()  # asked before listening: its last word is then heard
            kind, content = self._listen(child)
            if kind == PROGRESS:
                self._lease.progress = progress = Progress.model_validate(content)
                if progress.phase != phase:
                    phase = progress.phase
                    spans.close()
                    spans.enter_context(span(phase))
            elif kind == MEMORY:
                device, taken = content
                metrics.DEVICE_MEMORY.labels(device).set(taken)
            elif kind == FINISHED:
                return dict(content)
            elif kind == FAILED:
                self._end("failed", str(content))
                return None
            elif ended:
                self._end("crashed", child.cause_of_death())
                return None
            if self._lease.lost.is_set():
                metrics.ATTEMPTS.labels("lost").inc()
                return None
            if self._lease.cancelling.is_set():
                child.stop()
                self._end("cancelled", "stopped as asked")
                return None
            if self._stopping.is_set():
                child.stop()
                self._end("queued", "given back by a worker that shuts down")
                return None
            if time.monotonic() > self._deadline:
                child.stop()
                self._end("failed", f"not done within its time limit of {self._limit:g} seconds")
                return None
            if memory is not None and (resident := child.resident_bytes()) > memory:
                child.stop()
                self._end("failed", f"used {resident:,} bytes of memory; this worker allows {memory:,}")
                return None

    def _listen(self, child: Child) -> tuple[str, Any]:
        try:
            return child.said.get(timeout=LOOK_SECONDS)
        except Empty:
            return "", None

    # --- the last word

    def _publish(self, document: dict[str, Any]) -> None:
        """Attachments first, for a document that names a blob which is not there is refused."""
        blueprint = Blueprint.from_dict(document)
        job, token = self._claim.job, self._claim.lease_token

        def publish() -> None:
            for attachment in blueprint.attachments or ():
                self._client.upload_blob(self._folder / attachment.name)
            finished = self._client.finish_job(job.id, token, blueprint)
            logger.info("job %s: published version %s", job.id, finished.version)

        self._deliver(publish, "blueprint")

    def _hand_in(self, state: Path) -> None:
        """The partial result of a shard."""
        job, part, token = self._claim.job, self._claim.part, self._claim.lease_token
        self._deliver(lambda: self._client.finish_shard(job.id, part, token, state), "state of the shard")

    def _deliver(self, say: Callable[[], object], what: str) -> None:
        try:
            if self._insist(say):
                metrics.ATTEMPTS.labels("succeeded").inc()
        except (LeaseLost, JobFinished):
            raise
        except Conflict:  # asked to cancel while the result was on its way
            self._end("cancelled", "stopped as asked")
        except ApiError as refused:
            self._end("failed", f"the registry refused the {what}: {refused}")

    def _end(self, state: Literal["failed", "crashed", "cancelled", "queued"], reason: str) -> None:
        job = self._claim.job
        self.crashed = state == "crashed"
        metrics.ATTEMPTS.labels(state).inc()
        # Names that a source gives may hold what is no text: half of a surrogate pair, in JSON.
        reason = reason.encode(errors="backslashreplace").decode().replace("\0", "")[:4_000]
        logger.info("job %s: %s: %s", job.id, state, reason)
        outcome = JobOutcome(lease_token=self._claim.lease_token, state=state, reason=reason)
        self._insist(lambda: self._client.end_job(job.id, outcome))

    def _insist(self, say: Callable[[], object]) -> bool:
        """Say it until the registry has heard, and tell whether it has.

        Every word here can be said twice; the lease is kept up meanwhile.
        """
        deadline = time.monotonic() + REPORT_SECONDS
        pause = 0.5
        while not self._lease.lost.is_set():
            try:
                say()
            except PASSING as passing:
                if time.monotonic() > deadline or self._stopping.is_set():
                    logger.error("job %s: the registry was not told: %s", self._claim.job.id, passing)
                    return False
                logger.warning("job %s: the registry does not answer, trying again: %s", self._claim.job.id, passing)
                self._stopping.wait(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
            else:
                self._lease.release()
                return True
        return False
