"""The methods of both clients on jobs, for labs and for workers, each written once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from gradient_blueprints.calls import (
    JSON_BODY,
    Checkpointish,
    built,
    checkpoint_text,
    digest_text,
    job_path,
    left_until,
    listing,
    method,
    new_idempotency_key,
    some,
)
from gradient_blueprints.downloads import Downloading
from gradient_blueprints.errors import JobFinished
from gradient_blueprints.models import (
    Blueprint,
    Claim,
    DataSource,
    Heartbeat,
    HeartbeatAnswer,
    Job,
    JobEvent,
    JobOutcome,
    JobPage,
    JobState,
    NewJob,
    ProfileOptions,
    Progress,
)
from gradient_blueprints.transport import (
    Answer,
    Emit,
    EventParser,
    NoAnswer,
    Pause,
    ReadOn,
    Request,
    ServerEvent,
    Steps,
    Stream,
    jitter,
)

SILENCE = 60.0  # seconds; the registry sends a comment far more often, so a stream this quiet is dead

Source = str | PathLike[str] | DataSource


class JobMethods(Downloading):
    """Submit, watch and cancel; claim, renew and finish."""

    @method
    def submit_checkpoint(
        self,
        /,
        model_id: str,
        checkpoint: Checkpointish,
        *,
        source: str | PathLike[str] = "store",
        data: Mapping[str, Source],
        notes: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Steps[Job]:
        """Have the registry's workers profile a checkpoint; its blueprint becomes the next version.

        `source` is what you uploaded of the checkpoint (`upload_checkpoint`), or a folder as the workers see it,
        `s3://bucket/prefix` or `hf://org/name@revision`, as far as the workers' operator allows it. `data` is the
        text per domain: `store:PATH` beside the checkpoint, a file as the workers see it, or `s3://bucket/key`;
        `options` are the fields of ProfileOptions (batches, batch_size, sequence_length, seed, ...);
        with `shards=5` up to five workers share the batches, and the blueprint is what one would give.

            job = client.submit_checkpoint("tiny", 0.8, source="/data/tiny/0.8", data={"code": "/data/code.txt"})
            client.wait_for_job(job.id).version
        """
        new = built(
            NewJob,
            model_id=model_id,
            training_checkpoint=float(checkpoint_text(checkpoint)),
            source=str(source),
            data={
                domain: text if isinstance(text, DataSource) else DataSource(source=str(text))
                for domain, text in data.items()
            },
            options=built(ProfileOptions, **options),
            provenance_notes=notes,
        )
        headers = {**JSON_BODY, "Idempotency-Key": idempotency_key or new_idempotency_key()}
        body = new.model_dump_json(exclude_none=True).encode()
        answer = yield from self._exchange(Request("POST", "/v1/jobs", {}, headers, body))
        return answer.parse(Job)

    @method
    def get_job(self, job_id: str) -> Steps[Job]:
        """A job as it is now."""
        return (yield from self._read(Job, job_path(job_id)))

    @listing
    def list_jobs(self, state: JobState | str | None = None, *, limit: int | None = None) -> Stream[Job]:
        """Your lab's jobs, newest first; everybody's with scope admin or work."""
        yield from self._pages(JobPage, "jobs", "/v1/jobs", some(state=state), limit)

    @method
    def cancel_job(self, job_id: str) -> Steps[Job]:
        """Ask for the end of a job; a running one is `cancelling` until its worker has stopped."""
        return (yield from self._write(Job, "POST", job_path(job_id, "cancel")))

    @listing
    def watch_job(self, job_id: str, *, after: int | None = None) -> Stream[JobEvent]:
        """The events of a job as they happen, from the first (or the one after `after`) to its end.

        Reconnects where it was when the connection breaks, and misses nothing.
        """
        yield from self._watch(job_id, after, None)

    @method
    def wait_for_job(self, job_id: str, timeout: float | None = None) -> Steps[Job]:
        """The job when it has ended, however it ended: look at `state` and `reason`.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        yield from self._watch(job_id, None, deadline)
        return (yield from self._read(Job, job_path(job_id)))

    def _watch(self, job_id: str, after: int | None, deadline: float | None) -> Stream[JobEvent]:
        last = after
        quiet = 0  # connections in a row that brought no event
        while True:
            headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
            if last is not None:
                headers["Last-Event-ID"] = str(last)
            request = Request("GET", job_path(job_id, "events"), {}, headers)
            timeout = _left(job_id, deadline, self.timeout)
            silence = _left(job_id, deadline, SILENCE)
            answer = yield from self._exchange(request, stream=True, timeout=timeout, silence=silence)
            parser = EventParser()
            quiet += 1
            try:
                while chunk := (yield ReadOn(answer, None if deadline is None else _left(job_id, deadline, SILENCE))):
                    for event in parser.feed(chunk):
                        if event.event != "job":
                            continue
                        told = _job_event(answer, event)
                        last, quiet = told.id, 0
                        yield Emit(told)
                        if told.state.terminal:
                            return
            except NoAnswer:
                _left(job_id, deadline, SILENCE)
            if quiet:
                # A stream resumed after the last event of a finished job ends without a word.
                job = yield from self._read(Job, job_path(job_id))
                if job.state.terminal and quiet > 1:
                    return
                yield Pause(left_until(deadline, jitter(quiet)))

    # --- for workers

    @method
    def claim_job(self, job_id: str) -> Steps[Claim]:
        """Take a part of a job under a lease; JobFinished or Conflict when there is none to be had."""
        return (yield from self._write(Claim, "POST", job_path(job_id, "claim")))

    @method
    def heartbeat_job(self, job_id: str, lease_token: int, progress: Progress | None = None) -> Steps[HeartbeatAnswer]:
        """Renew the lease; LeaseLost when another worker has it now."""
        body = Heartbeat(lease_token=lease_token, progress=progress)
        return (yield from self._write(HeartbeatAnswer, "POST", job_path(job_id, "heartbeat"), body))

    @method
    def finish_job(self, job_id: str, lease_token: int, blueprint: Blueprint) -> Steps[Job]:
        """Hand in the blueprint: it is published and the job has succeeded, or neither.

        Repeated when its answer is lost, under an idempotency key of this lease: a repetition that
        finds the job ended by exactly this blueprint answers that job.
        """
        content = blueprint.to_canonical_bytes()
        headers = {**JSON_BODY, "Idempotency-Key": f"finish-{job_id}-{lease_token}"}
        request = Request("POST", job_path(job_id, "result"), some(lease_token=lease_token), headers, content)
        try:
            answer = yield from self._exchange(request)
        except JobFinished:
            job = yield from self._read(Job, job_path(job_id))
            if job.state is JobState.SUCCEEDED and job.digest == blueprint.digest:
                return job
            raise
        return answer.parse(Job)

    @method
    def finish_shard(self, job_id: str, shard: int, lease_token: int, state: str | Path) -> Steps[Job]:
        """Hand in the partial result of a shard, a file, streamed; safe to repeat."""
        headers = {"Content-Type": "application/octet-stream"}
        path = job_path(job_id, "shards", str(shard), "state")
        request = Request("PUT", path, some(lease_token=lease_token), headers, Path(state))
        answer = yield from self._exchange(request, silence=self.timeout)
        return answer.parse(Job)

    @method
    def fetch_shard_state(self, job_id: str, shard: int, digest: str, path: str | Path) -> Steps[Path]:
        """The partial result of a shard, whose digest is in the job's parts, as a file at `path`."""
        address = job_path(job_id, "shards", str(shard), "state")
        return (yield from self._fetch_file(address, digest_text(digest), Path(path)))

    @method
    def end_job(self, job_id: str, outcome: JobOutcome) -> Steps[Job]:
        """A worker's last word when there is no blueprint."""
        return (yield from self._write(Job, "POST", job_path(job_id, "outcome"), outcome))


def _left(job_id: str, deadline: float | None, most: float) -> float:
    left = left_until(deadline, most)
    if left == 0:
        raise TimeoutError(f"Job {job_id} had not ended when the time to wait for it was over; it goes on.")
    return left


def _job_event(answer: Answer, event: ServerEvent) -> JobEvent:
    answer.content = event.data.encode()
    return answer.parse(JobEvent)
