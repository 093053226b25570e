"""Jobs in parts over HTTP: each shard under a lease of its own, their states in the store, and the merge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import httpx2
import pytest
from alembic import command

from app.database import alembic_config, create_engine, create_sessions
from app.registry import job_parts, shard_states
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.canonical import digest_of
from gradient_blueprints.errors import Conflict, JobFinished, LeaseLost, PayloadTooLarge
from gradient_blueprints.models import Job, JobOutcome, JobState, Progress, Scope
from tests.conftest import Server
from tests.jobs.conftest import blueprint, states, submit

Sql = Callable[..., list[asyncpg.Record]]
InSession = Callable[..., int]


def outcome(token: int, state: str, reason: str = "because") -> JobOutcome:
    return JobOutcome.model_validate({"lease_token": token, "state": state, "reason": reason})


def parts(job: Job) -> list[tuple[str, int]]:
    return [(part.state.value, part.attempts) for part in job.parts]


@pytest.fixture
def hand_in(worker: Client, tmp_path: Path) -> Callable[[str, int, int], Job]:
    """A state whose bytes tell which shard it is of."""

    def run(job_id: str, shard: int, token: int) -> Job:
        path = tmp_path / f"{shard}-{token}"
        path.write_bytes(b"state %d" % shard)
        return worker.finish_shard(job_id, shard, token, path)

    return run


def test_each_shard_is_announced_and_claimed_once(lab: Client, worker: Client, sql: Sql) -> None:
    job = submit(lab, shards=3)
    assert parts(job) == [("queued", 0)] * 3
    assert [row["part"] for row in sql("SELECT part FROM outbox ORDER BY id")] == [0, 1, 2]

    def claim(_: int) -> tuple[int, int] | None:
        try:
            claimed = worker.claim_job(job.id)
        except Conflict:
            return None
        return claimed.part, claimed.lease_token

    with ThreadPoolExecutor(8) as threads:
        claims = sorted(filter(None, threads.map(claim, range(8))))
    assert [part for part, _ in claims] == [0, 1, 2]
    assert sorted(token for _, token in claims) == [1, 2, 3]


def test_shards_end_in_any_order_and_the_last_one_queues_the_merge(
    lab: Client, worker: Client, hand_in: Callable[..., Job], sql: Sql, tmp_path: Path
) -> None:
    job = submit(lab, shards=3)
    claims = [worker.claim_job(job.id) for _ in range(3)]
    sql("DELETE FROM outbox")
    for shard in (2, 0):
        assert hand_in(job.id, shard, claims[shard].lease_token).state is JobState.RUNNING
    with pytest.raises(Conflict):
        worker.claim_job(job.id)
    ended = hand_in(job.id, 1, claims[1].lease_token)
    assert parts(ended) == [("succeeded", 1)] * 3 + [("queued", 0)]
    assert [row["part"] for row in sql("SELECT part FROM outbox")] == [3]

    merge = worker.claim_job(job.id)
    assert (merge.part, merge.lease_token) == (3, 4)
    for shard, part in enumerate(merge.job.parts[:3]):
        assert part.digest is not None
        path = worker.fetch_shard_state(job.id, shard, part.digest, tmp_path / f"fetched-{shard}")
        assert path.read_bytes() == b"state %d" % shard
    finished = worker.finish_job(job.id, merge.lease_token, blueprint())
    assert (finished.state, finished.version, finished.attempts) == (JobState.SUCCEEDED, 1, 1)
    assert states(lab, job.id) == ["queued"] + ["running"] * 7 + ["succeeded"]
    told = [event.parts for event in lab.watch_job(job.id)]
    assert told[0] == {JobState.QUEUED: 3}
    assert told[-1] == {JobState.SUCCEEDED: 4}


def test_a_lost_lease_repeats_its_shard_alone_and_refuses_the_late_upload(
    lab: Client, worker: Client, hand_in: Callable[..., Job], sql: Sql, in_session: InSession
) -> None:
    job = submit(lab, shards=2)
    lost, kept = worker.claim_job(job.id), worker.claim_job(job.id)
    sql("UPDATE job_parts SET lease_expires_at = now() - interval '1 second' WHERE number = $1", lost.part)
    assert in_session(job_parts.end_lost_attempts) == 1
    again = lab.get_job(job.id)
    assert (again.state, parts(again)) == (JobState.RUNNING, [("queued", 1), ("running", 1)])
    assert again.reason == "shard 0, attempt 1 of 3: the worker stopped renewing its lease"
    with pytest.raises(LeaseLost):  # claimed by nobody yet
        hand_in(job.id, lost.part, lost.lease_token)
    new = worker.claim_job(job.id)
    assert (new.part, new.lease_token) == (0, 3)
    for token in (lost.lease_token, kept.lease_token):  # of a worker that is late, and of another shard
        with pytest.raises(LeaseLost):
            hand_in(job.id, 0, token)
    assert parts(hand_in(job.id, 0, new.lease_token)) == [("succeeded", 2), ("running", 1)]
    assert parts(hand_in(job.id, 1, kept.lease_token)) == [("succeeded", 2), ("succeeded", 1), ("queued", 0)]


def test_a_state_handed_in_again_is_answered_with_the_job(
    lab: Client, worker: Client, hand_in: Callable[..., Job]
) -> None:
    job = submit(lab, shards=2)
    token = worker.claim_job(job.id).lease_token
    assert hand_in(job.id, 0, token) == hand_in(job.id, 0, token)
    with pytest.raises(JobFinished):
        worker.heartbeat_job(job.id, token)


def test_a_shard_does_not_publish_and_a_merge_does_not_hand_in(
    lab: Client, worker: Client, hand_in: Callable[..., Job]
) -> None:
    job = submit(lab, shards=2)
    tokens = [worker.claim_job(job.id).lease_token for _ in range(2)]
    with pytest.raises(Conflict, match="hand in its state"):
        worker.finish_job(job.id, tokens[0], blueprint())
    for shard, token in enumerate(tokens):
        hand_in(job.id, shard, token)
    merge = worker.claim_job(job.id)
    with pytest.raises(Conflict, match="ends with a blueprint"):
        hand_in(job.id, merge.part, merge.lease_token)
    whole = submit(lab)
    with pytest.raises(Conflict, match="ends with a blueprint"):
        hand_in(whole.id, 0, worker.claim_job(whole.id).lease_token)


def test_a_failing_shard_fails_the_job_and_stops_the_others(lab: Client, worker: Client) -> None:
    job = submit(lab, shards=3)
    failing, other = worker.claim_job(job.id), worker.claim_job(job.id)
    ended = worker.end_job(job.id, outcome(failing.lease_token, "failed", "not done within its time limit"))
    assert (ended.state, ended.reason) == (JobState.FAILED, "not done within its time limit")
    assert [state for state, _ in parts(ended)] == ["failed", "cancelled", "cancelled"]
    for write in (lambda: worker.heartbeat_job(job.id, other.lease_token), lambda: worker.claim_job(job.id)):
        with pytest.raises(JobFinished):
            write()


def test_attempts_are_counted_by_shard_and_the_last_of_one_crashes_the_job(lab: Client, worker: Client) -> None:
    job = submit(lab, shards=2)
    steady = worker.claim_job(job.id)
    for attempt in (1, 2, 3):
        claim = worker.claim_job(job.id)
        assert claim.part == 1
        answer = worker.end_job(job.id, outcome(claim.lease_token, "crashed", "killed"))
        assert parts(answer)[1] == ("crashed" if attempt == 3 else "queued", attempt)
    assert (answer.state, answer.reason) == (JobState.CRASHED, "shard 1, attempt 3 of 3: killed")
    with pytest.raises(JobFinished):
        worker.heartbeat_job(job.id, steady.lease_token)


def test_a_crashed_merge_is_done_again_and_no_shard_with_it(
    lab: Client, worker: Client, hand_in: Callable[..., Job]
) -> None:
    job = submit(lab, shards=2)
    for _ in range(2):
        claim = worker.claim_job(job.id)
        hand_in(job.id, claim.part, claim.lease_token)
    answer = worker.end_job(job.id, outcome(worker.claim_job(job.id).lease_token, "crashed", "killed"))
    assert (answer.state, parts(answer)[2]) == (JobState.RUNNING, ("queued", 1))
    assert answer.reason == "merge, attempt 1 of 3: killed"
    claim = worker.claim_job(job.id)
    assert worker.finish_job(job.id, claim.lease_token, blueprint()).state is JobState.SUCCEEDED


def test_cancelling_ends_queued_shards_at_once_and_the_job_with_the_last_running_one(
    lab: Client, worker: Client, hand_in: Callable[..., Job]
) -> None:
    job = submit(lab, shards=3)
    tokens = [worker.claim_job(job.id).lease_token for _ in range(2)]
    asked = lab.cancel_job(job.id)
    assert (asked.state, [state for state, _ in parts(asked)]) == (
        JobState.CANCELLING,
        ["cancelling", "cancelling", "cancelled"],
    )
    assert worker.heartbeat_job(job.id, tokens[0]).state is JobState.CANCELLING
    with pytest.raises(Conflict, match="being cancelled"):
        hand_in(job.id, 0, tokens[0])
    assert worker.end_job(job.id, outcome(tokens[0], "cancelled")).state is JobState.CANCELLING
    ended = worker.end_job(job.id, outcome(tokens[1], "cancelled"))
    assert (ended.state, ended.reason) == (JobState.CANCELLED, "cancelled by lab-a")


def test_a_shard_given_back_costs_no_attempt(lab: Client, worker: Client) -> None:
    job = submit(lab, shards=2)
    claim = worker.claim_job(job.id)
    answer = worker.end_job(job.id, outcome(claim.lease_token, "queued"))
    assert (answer.state, parts(answer)) == (JobState.QUEUED, [("queued", 0), ("queued", 0)])


def test_the_progress_of_a_job_is_the_sum_of_its_shards(
    lab: Client, worker: Client, hand_in: Callable[..., Job]
) -> None:
    job = submit(lab, shards=2)
    first, second = worker.claim_job(job.id), worker.claim_job(job.id)
    worker.heartbeat_job(job.id, first.lease_token, Progress(phase="profiling", done=1, total=3))
    assert lab.get_job(job.id).progress == Progress(phase="profiling", done=1)
    worker.heartbeat_job(job.id, second.lease_token, Progress(phase="profiling", done=2, total=2))
    assert lab.get_job(job.id).progress == Progress(phase="profiling", done=3, total=5)
    hand_in(job.id, 0, first.lease_token)
    assert lab.get_job(job.id).progress == Progress(phase="profiling", done=5, total=5)
    events = [event for event in _events(lab, job, worker) if event is not None]
    assert events == [Progress(phase="profiling", done=1), Progress(phase="profiling", done=3, total=5)]


def _events(lab: Client, job: Job, worker: Client) -> list[Progress | None]:
    lab.cancel_job(job.id)
    worker.end_job(job.id, outcome(2, "cancelled"))
    return [event.progress for event in lab.watch_job(job.id)]


def test_only_the_parts_that_nobody_claimed_are_announced_again(
    lab: Client, worker: Client, sql: Sql, in_session: InSession
) -> None:
    job = submit(lab, shards=3)
    worker.claim_job(job.id)
    sql("DELETE FROM outbox")
    sql("UPDATE job_parts SET announced_at = now() - interval '1 hour', announcements = 1")
    assert in_session(lambda session: job_parts.announce_again(session, reannounce_seconds=60)) == 2
    assert [row["part"] for row in sql("SELECT part FROM outbox ORDER BY part")] == [1, 2]
    assert in_session(lambda session: job_parts.announce_again(session, reannounce_seconds=60)) == 0


def test_a_state_is_served_in_ranges_to_workers_alone(
    lab: Client, worker: Client, hand_in: Callable[..., Job], server: Server, http: httpx2.Client
) -> None:
    job = submit(lab, shards=2)
    claim = worker.claim_job(job.id)
    path = f"/v1/jobs/{job.id}/shards/0/state"
    key = {"Authorization": f"Bearer {server.key('workers', Scope.WORK)}"}
    assert http.get(path, headers=key).status_code == 409
    hand_in(job.id, 0, claim.lease_token)
    assert http.get(path, headers=key).content == b"state 0"
    ranged = http.get(path, headers=key | {"Range": "bytes=6-"})
    assert (ranged.status_code, ranged.content) == (206, b"0")
    assert http.get(path, headers=key | {"Range": "bytes=7-"}).status_code == 416
    assert lab.get_job(job.id).parts[0].digest == digest_of(b"state 0")
    lab_key = {"Authorization": f"Bearer {server.key('lab-a', Scope.PROFILE, Scope.PUBLISH, Scope.READ)}"}
    assert http.get(path, headers=lab_key).status_code == 403
    assert http.put(path, params={"lease_token": 1}, content=b"x", headers=lab_key).status_code == 403


def test_states_are_removed_once_their_job_has_ended(
    lab: Client, worker: Client, hand_in: Callable[..., Job], settings: Settings
) -> None:
    open_job, ended = submit(lab, shards=2), submit(lab, shards=2)
    for job in (open_job, ended):
        hand_in(job.id, 0, worker.claim_job(job.id).lease_token)
    lab.cancel_job(ended.id)
    (settings.store / "shards" / ".snapshot").mkdir()  # what a file system or a person may leave there

    async def clean() -> int:
        engine = create_engine(settings)
        try:
            return await shard_states.remove_ended(create_sessions(engine), settings.store)
        finally:
            await engine.dispose()

    assert asyncio.run(clean()) == 1
    assert {path.name for path in (settings.store / "shards").iterdir()} == {open_job.id, ".snapshot"}
    assert list((settings.store / "incoming").iterdir()) == []


class TestSmallStore:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_shard_bytes": 3})

    def test_a_state_beyond_the_limit_is_refused_and_leaves_nothing(
        self, lab: Client, worker: Client, hand_in: Callable[..., Job], settings: Settings
    ) -> None:
        job = submit(lab, shards=2)
        token = worker.claim_job(job.id).lease_token
        with pytest.raises(PayloadTooLarge):
            hand_in(job.id, 0, token)
        assert parts(lab.get_job(job.id))[0] == ("running", 1)
        assert [path for path in settings.store.rglob("*") if path.is_file()] == []


def test_the_database_itself_keeps_the_terminal_state_of_a_part(lab: Client, sql: Sql) -> None:
    job = submit(lab, shards=2)
    lab.cancel_job(job.id)
    with pytest.raises(asyncpg.RestrictViolationError):
        sql("UPDATE job_parts SET state = 'queued'")


def test_open_and_ended_jobs_survive_the_migration_both_ways(
    lab: Client, worker: Client, sql: Sql, database_url: str
) -> None:
    done, running, split = submit(lab), submit(lab), submit(lab, shards=2)
    worker.finish_job(done.id, worker.claim_job(done.id).lease_token, blueprint())
    token = worker.claim_job(running.id).lease_token
    worker.heartbeat_job(running.id, token, Progress(phase="profiling", done=1, total=3))
    for _ in range(2):
        worker.claim_job(split.id)
    config = alembic_config(database_url)
    command.downgrade(config, "0002")
    rows = {str(row["id"]): row for row in sql("SELECT * FROM jobs")}
    assert [rows[job.id]["attempts"] for job in (done, running, split)] == [1, 1, 1]
    assert [rows[job.id]["state"] for job in (done, running, split)] == ["succeeded", "running", "running"]
    assert json.loads(rows[running.id]["progress"])["done"] == 1
    assert "shards" not in json.loads(rows[split.id]["request"])["options"]
    assert rows[split.id]["lease_expires_at"] < rows[running.id]["lease_expires_at"], "its workers have lost it"
    command.upgrade(config, "head")
    for job, state in ((done, JobState.SUCCEEDED), (running, JobState.RUNNING), (split, JobState.RUNNING)):
        found = lab.get_job(job.id)
        assert (found.state, [part.attempts for part in found.parts]) == (state, [1])
    assert worker.heartbeat_job(running.id, token).state is JobState.RUNNING
