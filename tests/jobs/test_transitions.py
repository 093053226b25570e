"""Every transition of a job over HTTP, and every one that must not happen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import job_parts, outbox
from gradient_blueprints import Client
from gradient_blueprints.errors import BlueprintsError, Conflict, InvalidRequest, JobFinished, LeaseLost
from gradient_blueprints.models import Job, JobOutcome, JobState, Progress, Scope
from tests.api.test_metrics import scrape, value
from tests.conftest import Server
from tests.jobs.conftest import blueprint, states, submit
from tests.worker.conftest import wait_until

Sql = Callable[..., list[asyncpg.Record]]
InSession = Callable[[Callable[[AsyncSession], Awaitable[Any]]], Any]


def outcome(token: int, state: str, reason: str = "because") -> JobOutcome:
    return JobOutcome.model_validate({"lease_token": token, "state": state, "reason": reason})


def test_a_submitted_job_is_queued_with_its_message_in_the_outbox(lab: Client, sql: Sql) -> None:
    job = submit(lab, batches=3)
    assert (job.state, job.attempts, job.max_attempts, job.lab) == (JobState.QUEUED, 0, 3, "lab-a")
    assert job.options.batches == 3
    assert [str(row["job_id"]) for row in sql("SELECT job_id FROM outbox")] == [job.id]


def test_a_job_that_succeeds_publishes_under_the_lab_that_asked(lab: Client, worker: Client) -> None:
    job = submit(lab)
    claim = worker.claim_job(job.id)
    assert claim.job.state is JobState.RUNNING
    assert (claim.job.attempts, claim.lease_token) == (1, 1)
    assert worker.heartbeat_job(job.id, 1, Progress(phase="profiling", done=2, total=8)).state is JobState.RUNNING
    assert lab.get_job(job.id).progress == Progress(phase="profiling", done=2, total=8)

    finished = worker.finish_job(job.id, 1, blueprint())

    assert (finished.state, finished.version, finished.digest) == (JobState.SUCCEEDED, 1, blueprint().digest)
    assert finished.started_at is not None
    assert finished.finished_at is not None
    fetched = lab.fetch_blueprint("tiny", 0.8)
    assert (fetched.lab, fetched.version, fetched) == ("lab-a", 1, blueprint())
    assert states(lab, job.id) == ["queued", "running", "running", "succeeded"]


def test_a_result_sent_again_is_answered_with_the_finished_job_and_published_once(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    first = worker.finish_job(job.id, token, blueprint())
    assert worker.finish_job(job.id, token, blueprint()) == first
    with pytest.raises(JobFinished):
        worker.finish_job(job.id, token, blueprint(norm=0.25))
    assert [version.version for version in lab.list_versions("tiny", 0.8)] == [1]


def test_a_result_is_counted_as_a_publication_once_and_as_a_new_version_if_it_made_one(
    server: Server, lab: Client, worker: Client
) -> None:
    for _ in range(2):
        job = submit(lab)
        token = worker.claim_job(job.id).lease_token
        for _ in range(3):
            worker.finish_job(job.id, token, blueprint())
    samples = scrape(server)
    for created in ("yes", "no"):  # the second job found what the first had found
        assert value(samples, "blueprints_publications_total", source="worker", created=created) == 1


def test_a_result_under_a_lost_lease_is_refused_and_publishes_nothing(
    lab: Client, worker: Client, expire_lease: Callable[[], int]
) -> None:
    job = submit(lab)
    old = worker.claim_job(job.id).lease_token
    assert expire_lease() == 1
    with pytest.raises(LeaseLost):  # queued again, claimed by nobody yet
        worker.finish_job(job.id, old, blueprint())
    new = worker.claim_job(job.id).lease_token
    assert new > old
    for write in (
        lambda: worker.finish_job(job.id, old, blueprint()),
        lambda: worker.heartbeat_job(job.id, old),
        lambda: worker.end_job(job.id, outcome(old, "failed")),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert list(lab.list_models()) == []
    assert worker.finish_job(job.id, new, blueprint()).state is JobState.SUCCEEDED
    with pytest.raises(LeaseLost):  # the same result, but of the worker that lost the job
        worker._run(_finish_once(worker, job, old))
    assert [version.version for version in lab.list_versions("tiny", 0.8)] == [1]


def _finish_once(client: Client, job: Job, token: int):  # type: ignore[no-untyped-def]
    """The bare request, without the SDK's look at the finished job."""
    from gradient_blueprints.transport import Request

    body = blueprint().to_canonical_bytes()
    headers = {"Content-Type": "application/json"}
    return (
        yield from client._exchange(
            Request("POST", f"/v1/jobs/{job.id}/result", {"lease_token": str(token)}, headers, body)
        )
    )


def test_of_many_claimers_at_once_exactly_one_gets_the_job(lab: Client, worker: Client) -> None:
    job = submit(lab)
    worker.get_job(job.id)

    def claim(_: int) -> str:
        try:
            return f"lease {worker.claim_job(job.id).lease_token}"
        except Conflict:
            return "refused"

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(claim, range(12)))
    assert sorted(answers) == ["lease 1"] + ["refused"] * 11
    assert lab.get_job(job.id).attempts == 1


def test_of_a_result_and_a_cancel_at_once_exactly_one_happens(lab: Client, worker: Client) -> None:
    for round_ in range(5):
        job = submit(lab, model_id=f"tiny-{round_}")
        token = worker.claim_job(job.id).lease_token

        def attempt(action: Callable[[], object]) -> bool:
            try:
                action()
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(2) as threads:
            finished = threads.submit(attempt, lambda: worker.finish_job(job.id, token, blueprint(f"tiny-{round_}")))  # noqa: B023
            cancelled = threads.submit(attempt, lambda: lab.cancel_job(job.id))  # noqa: B023
        assert finished.result() != cancelled.result()
        expected = JobState.SUCCEEDED if finished.result() else JobState.CANCELLING
        assert lab.get_job(job.id).state is expected


def test_a_result_about_something_else_is_refused_and_the_job_goes_on(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    with pytest.raises(InvalidRequest) as refused:
        worker.finish_job(job.id, token, blueprint("other"))
    assert refused.value.errors[0]["pointer"] == "/model_id"
    assert lab.get_job(job.id).state is JobState.RUNNING


def test_a_lost_attempt_is_queued_again_until_the_last_which_crashes(
    lab: Client, worker: Client, expire_lease: Callable[[], int], sql: Sql
) -> None:
    job = submit(lab)
    for attempt in (1, 2):
        worker.claim_job(job.id)
        sql("DELETE FROM outbox")
        assert expire_lease() == 1
        again = lab.get_job(job.id)
        assert again.state is JobState.QUEUED
        assert again.reason == f"attempt {attempt} of 3: the worker stopped renewing its lease"
        assert len(sql("SELECT 1 FROM outbox")) == 1
    worker.claim_job(job.id)
    assert expire_lease() == 1
    ended = lab.get_job(job.id)
    assert (ended.state, ended.attempts) == (JobState.CRASHED, 3)
    assert expire_lease() == 0
    with pytest.raises(JobFinished):
        worker.claim_job(job.id)


def test_a_crash_that_the_worker_reports_counts_as_an_attempt_at_once(lab: Client, worker: Client) -> None:
    job = submit(lab)
    for attempt in (1, 2, 3):
        token = worker.claim_job(job.id).lease_token
        answer = worker.end_job(job.id, outcome(token, "crashed", "killed by signal 9"))
        assert answer.state is (JobState.CRASHED if attempt == 3 else JobState.QUEUED)
        assert worker.end_job(job.id, outcome(token, "crashed", "killed by signal 9")) == answer
    assert answer.reason == "attempt 3 of 3: killed by signal 9"


def test_a_failure_is_final_and_keeps_its_reason(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    ended = worker.end_job(job.id, outcome(token, "failed", "config.json is missing"))
    assert (ended.state, ended.reason) == (JobState.FAILED, "config.json is missing")
    assert worker.end_job(job.id, outcome(token, "failed", "config.json is missing")) == ended
    for write in (
        lambda: worker.heartbeat_job(job.id, token),
        lambda: worker.finish_job(job.id, token, blueprint()),
        lambda: lab.cancel_job(job.id),
        lambda: worker.claim_job(job.id),
    ):
        with pytest.raises(JobFinished):
            write()


def test_a_job_given_back_costs_no_attempt(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    answer = worker.end_job(job.id, outcome(token, "queued", "the worker shuts down"))
    assert (answer.state, answer.attempts) == (JobState.QUEUED, 0)
    claim = worker.claim_job(job.id)
    assert (claim.job.attempts, claim.lease_token) == (1, 2)


def test_a_job_that_is_given_back_for_ever_ends(lab: Client, worker: Client) -> None:
    job = submit(lab)
    for _ in range(40):
        token = worker.claim_job(job.id).lease_token
        if worker.end_job(job.id, outcome(token, "queued")).state is JobState.CRASHED:
            break
    assert lab.get_job(job.id).state is JobState.CRASHED


def test_cancelling_a_queued_job_ends_it_at_once(lab: Client, worker: Client) -> None:
    job = submit(lab)
    ended = lab.cancel_job(job.id)
    assert (ended.state, ended.reason) == (JobState.CANCELLED, "cancelled by lab-a")
    assert lab.cancel_job(job.id) == ended
    with pytest.raises(JobFinished):
        worker.claim_job(job.id)


def test_cancelling_a_running_job_reaches_the_worker_by_its_heartbeat(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    assert lab.cancel_job(job.id).state is JobState.CANCELLING
    assert lab.cancel_job(job.id).state is JobState.CANCELLING
    assert worker.heartbeat_job(job.id, token).state is JobState.CANCELLING
    with pytest.raises(Conflict, match="being cancelled"):
        worker.finish_job(job.id, token, blueprint())
    ended = worker.end_job(job.id, outcome(token, "cancelled", "stopped"))
    assert (ended.state, ended.reason) == (JobState.CANCELLED, "cancelled by lab-a")
    assert states(lab, job.id) == ["queued", "running", "cancelling", "cancelled"]
    assert list(lab.list_models()) == []


def test_a_cancelling_job_whose_worker_is_gone_is_cancelled_by_the_sweeper(
    lab: Client, worker: Client, expire_lease: Callable[[], int]
) -> None:
    job = submit(lab)
    worker.claim_job(job.id)
    lab.cancel_job(job.id)
    assert expire_lease() == 1
    assert lab.get_job(job.id).state is JobState.CANCELLED


def test_a_heartbeat_does_not_prolong_the_lease_of_a_cancelling_job(lab: Client, worker: Client, sql: Sql) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token

    def expiry() -> object:
        return sql("SELECT lease_expires_at FROM job_parts")[0][0]

    before = expiry()
    worker.heartbeat_job(job.id, token)
    renewed = expiry()
    assert renewed > before  # type: ignore[operator]
    lab.cancel_job(job.id)
    worker.heartbeat_job(job.id, token)
    assert expiry() == renewed


def test_a_worker_cannot_cancel_what_nobody_asked_to_cancel(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    with pytest.raises(Conflict, match="Nobody asked"):
        worker.end_job(job.id, outcome(token, "cancelled"))
    assert lab.get_job(job.id).state is JobState.RUNNING


@pytest.mark.parametrize("state", ["succeeded", "failed", "crashed", "cancelled"])
def test_the_database_itself_keeps_a_terminal_state(state: str, lab: Client, sql: Sql) -> None:
    job = submit(lab)
    sql("UPDATE jobs SET state = $1, finished_at = now() WHERE id = $2", state, job.id)
    for other in ("queued", "running", "failed" if state != "failed" else "succeeded"):
        with pytest.raises(asyncpg.RestrictViolationError):
            sql("UPDATE jobs SET state = $1 WHERE id = $2", other, job.id)


def test_events_can_be_neither_changed_nor_deleted(lab: Client, sql: Sql) -> None:
    submit(lab)
    for statement in ("UPDATE job_events SET state = 'failed'", "DELETE FROM job_events"):
        with pytest.raises(asyncpg.RestrictViolationError):
            sql(statement)


def test_progress_that_did_not_change_makes_no_event(lab: Client, worker: Client, sql: Sql) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    for done in (1, 1, 1, 2, 2):
        worker.heartbeat_job(job.id, token, Progress(phase="profiling", done=done, total=2))
    worker.heartbeat_job(job.id, token)
    assert len(sql("SELECT 1 FROM job_events WHERE progress IS NOT NULL")) == 2


def test_every_write_leaves_an_audit_entry(lab: Client, worker: Client, admin: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    worker.finish_job(job.id, token, blueprint())
    lab.cancel_job(submit(lab).id)
    actions = [entry.action for entry in admin.list_audit() if entry.action.startswith(("job.", "blueprint."))]
    assert actions == ["job.cancel", "job.submit", "job.finish", "blueprint.publish", "job.claim", "job.submit"]


def test_a_failing_publish_leaves_the_job_running(lab: Client, worker: Client) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    missing = {"name": "factors.safetensors", "media_type": "application/octet-stream", "size": 1}
    document = blueprint().to_dict() | {"attachments": [missing | {"digest": "sha256:" + "0" * 64}]}
    with pytest.raises(BlueprintsError, match="attachments"):
        worker.finish_job(job.id, token, blueprint().from_dict(document))
    assert lab.get_job(job.id).state is JobState.RUNNING
    assert worker.finish_job(job.id, token, blueprint()).state is JobState.SUCCEEDED


def test_the_worker_of_one_lab_serves_another_without_owning_its_models(
    make_client: Callable[..., Client], worker: Client
) -> None:
    first, second = make_client("lab-a", Scope.PROFILE), make_client("lab-b", Scope.PROFILE)
    for client, norm in ((first, 0.5), (second, 0.25)):
        job = submit(client)
        worker.finish_job(job.id, worker.claim_job(job.id).lease_token, blueprint(norm=norm))
    assert first.fetch_blueprint("tiny", 0.8).lab == "lab-a"
    assert {version.lab for version in first.list_versions("tiny", 0.8)} == {"lab-a", "lab-b"}


# --- beside each other


def waits_for_locks(sql: Sql, connections: int) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    wait_until(lambda: sql(query)[0][0] == connections)


async def begin(database_url: str, statement: str) -> asyncpg.Connection:
    """A connection whose transaction has executed the statement and goes on."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(f"BEGIN; {statement}")
    return connection


def test_a_job_can_be_cancelled_while_it_is_announced_again(
    lab: Client, publisher: httpx2.Client, sql: Sql, in_session: InSession, database_url: str
) -> None:
    job = submit(lab)
    sql("DELETE FROM outbox")
    sql("UPDATE job_parts SET announced_at = now() - interval '1 hour', announcements = 1")
    with asyncio.Runner() as runner, ThreadPoolExecutor(2) as threads:
        holder = runner.run(begin(database_url, "LOCK TABLE outbox IN SHARE MODE"))
        announced = threads.submit(in_session, lambda session: job_parts.announce_again(session, reannounce_seconds=60))
        waits_for_locks(sql, 1)  # it has locked the part, and the message is to be written
        cancelled = threads.submit(publisher.post, f"/v1/jobs/{job.id}/cancel")
        waits_for_locks(sql, 2)
        runner.run(holder.close())
        assert (announced.result(), cancelled.result().status_code) == (1, 200)


def test_the_relay_takes_parts_in_the_order_in_which_a_cancel_takes_them(
    lab: Client, sql: Sql, in_session: InSession, database_url: str
) -> None:
    submit(lab, shards=2)
    sql("UPDATE job_parts SET announced_at = now() WHERE number = 0")  # its row comes last in the table now,
    sql("ANALYZE job_parts")  # which is small enough to be read in its own order

    async def take(_: outbox.Announcement) -> None: ...

    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as threads:
        other = runner.run(begin(database_url, "UPDATE job_parts SET reason = 'x' WHERE number = 0"))
        sent = threads.submit(in_session, lambda session: outbox.send_waiting(session, take))
        waits_for_locks(sql, 1)
        runner.run(other.execute("UPDATE job_parts SET reason = 'x' WHERE number = 1; COMMIT"))
        runner.run(other.close())
        assert sent.result() == (2, None)
