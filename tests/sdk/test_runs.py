"""Reporting and ranking runs through both clients, a journal that was cut off, and the commands."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from gradient_blueprints import (
    AsyncClient,
    Client,
    ConfigurationError,
    ConnectionFailed,
    RunConflict,
    RunFinished,
    RunHandle,
    run_methods,
)
from gradient_blueprints.record_models import NewRun, ReportedPoint, RunEnd
from gradient_blueprints.run_journal import (
    GrowingJournal,
    begin_journal,
    find_journal,
    journal_end,
    journal_point,
    read_journal,
)
from gradient_blueprints.run_models import Basis, Instrument, Method, Resource, Span, Tally
from gradient_blueprints.transport import Pause
from tests.conftest import Server
from tests.sdk.test_cli import Run, blueprints, environment

__all__ = ["blueprints", "environment"]  # fixtures

GIVEN = Method(basis=Basis.MEASURED, instruments=(Instrument.GIVEN,))


def tally(seconds: float) -> Tally:
    span = Span(sensor="host-7f", resource=Resource.SECONDS, started=0, ended=seconds, amount=seconds)
    hardware = {"host-7f": "a processor"}
    return Tally(seconds=seconds, methods={Resource.SECONDS: GIVEN}, spans=(span,), hardware=hardware)


def point(number: int) -> ReportedPoint:
    return ReportedPoint(step=number, psi=9.0 - number, gamma={Resource.SECONDS: number + 1.0})


def new_run(**fields: Any) -> NewRun:
    return NewRun.model_validate({"id": uuid.uuid4(), "task": "t", "model_id": "m", "metric": "loss"} | fields)


async def performed(result: Any) -> Any:
    """What a method of a RunHandle answers, of either client."""
    return await result if hasattr(result, "__await__") else result


async def test_a_run_is_reported_while_it_goes_on_and_then_ranked(lab_a: Any) -> None:
    handle: RunHandle = await lab_a.report_run("t", "org/m", metric="loss", checkpoint=0.8, seed=1, settings={"lr": 1})
    await performed(handle.append(1, 5.0, {"seconds": 1.0}))
    assert (await lab_a.get_run(handle.run.id)).last.psi == 5.0
    await performed(handle.append(2, 4.0, tally(2.0)))
    assert handle.run.points == 2
    finished = await performed(handle.finish(tally(3.0), stopped="enough"))
    assert (finished.final.gamma, finished.stopped) == ({Resource.SECONDS: 3.0}, "enough")
    assert finished.tally.hardware == {"1": "a processor"}  # neither the names of sensors nor the spans have left
    assert [run.id for run in await lab_a.list_runs("t")] == [handle.run.id]
    assert await lab_a.list_runs("t", model="other") == []
    assert [(p.step, p.psi) for p in await lab_a.list_points(handle.run.id)] == [(1, 5.0), (2, 4.0)]
    board = await lab_a.leaderboard("t", "seconds", at_psi=4.5)
    (entry,) = board.groups[0].entries
    assert (entry.value, entry.lab, entry.settings) == (1.5, "lab-a", {"lr": 1})
    assert (await lab_a.leaderboard("t", "seconds", at_gamma=2)).groups[0].entries[0].value == 4.0


async def test_what_cannot_be_is_refused_before_it_is_sent(lab_a: Any) -> None:
    with pytest.raises(ConfigurationError, match="task"):
        await lab_a.report_run("=cmd()", "m", metric="loss")
    with pytest.raises(ConfigurationError, match="at_gamma or at_psi"):
        await lab_a.leaderboard("t", "seconds", at_gamma=1, at_psi=1)
    with pytest.raises(ConfigurationError, match="UUID"):
        await lab_a.get_run("../labs")


def test_points_that_could_not_be_sent_go_with_the_next(server: Server) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        handle = client.report_run("t", "m", metric="loss")
        away = Client("http://127.0.0.1:9", cache=False, timeout=0.05)
        handle._client, here = away, handle._client
        with pytest.raises(ConnectionFailed):
            handle.append(1, 5.0, {"seconds": 1.0})
        with pytest.raises(ConfigurationError, match="follows step 1"):
            handle.append(1, 5.0, {"seconds": 1.0})
        handle._client = here
        handle.append(2, 4.0, {"seconds": 2.0})
        assert [p.step for p in client.list_points(handle.run.id)] == [1, 2]


async def test_a_point_that_is_refused_does_not_keep_a_run_from_its_end(
    lab_a: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, other = [await lab_a.report_run("t", "m", metric="loss", run_id=uuid.UUID(int=7)) for _ in range(2)]
    await performed(handle.append(100, 5.0, {"seconds": 1.0}))
    for step in (100, 99):  # an evaluation of the last step once more, and a training that was set back
        with pytest.raises(ConfigurationError, match=f"Step {step} follows step 100"):
            await performed(handle.append(step, 5.0, {"seconds": 1.0}))
    with pytest.raises(RunConflict):  # what the registry alone can tell
        await performed(other.append(100, 4.0, {"seconds": 1.0}))
    await performed(handle.append(200, 4.0, {"seconds": 2.0}))
    monkeypatch.setattr(run_methods, "MAX_POINTS", 2)
    with pytest.raises(ConfigurationError, match="at most 2 points"):
        await performed(handle.append(300, 3.0, {"seconds": 3.0}))
    with pytest.raises(ConfigurationError, match="stopped"):
        await performed(handle.finish(tally(4.0), stopped="why" * 500))
    finished = await performed(other.finish(tally(4.0)))
    assert (finished.points, finished.final.psi) == (2, 4.0)
    with pytest.raises(RunFinished):
        await performed(handle.finish(tally(5.0)))


async def test_a_run_that_is_gone_on_with_knows_its_last_step(lab_a: Any) -> None:
    handle = await lab_a.report_run("t", "m", metric="loss", run_id=uuid.UUID(int=7))
    await performed(handle.append(100, 5.0, {"seconds": 1.0}))
    again = await lab_a.report_run("t", "m", metric="loss", run_id=uuid.UUID(int=7))
    with pytest.raises(ConfigurationError, match="follows step 100"):
        again.append(100, 5.0, {"seconds": 1.0})
    await performed(again.append(101, 5.0, {"seconds": 1.0}))


async def test_a_late_answer_takes_back_no_point(server: Server) -> None:
    """The first of two appends is answered last, and a third point waits meanwhile."""
    async with AsyncClient(server.url, api_key=server.key("lab-a"), cache=False) as client:
        handle = await client.report_run("t", "m", metric="loss")
        late, on_its_way = client._repeatable, asyncio.Event()

        def held(path: str, body: Any) -> Any:
            client._repeatable = late  # type: ignore[method-assign]
            run = yield from late(path, body)
            on_its_way.set()
            yield Pause(1)
            return run

        client._repeatable = held  # type: ignore[method-assign]
        first = asyncio.create_task(handle.append(1, 5.0, {"seconds": 1.0}))
        await on_its_way.wait()
        await handle.append(2, 4.0, {"seconds": 2.0})
        handle._waiting.append(point(3))
        await first
        assert handle.run.points == 3
        assert [p.step async for p in client.list_points(handle.run.id)] == [1, 2, 3]


# --- journals


async def test_a_journal_is_sent_in_batches_and_only_what_is_missing(
    lab_a: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_methods, "BATCH", 2)
    path, new = tmp_path / "run.jsonl", new_run()
    begin_journal(path, new)
    for number in range(5):
        journal_point(path, point(number), tally(number + 1.0))
    assert (await lab_a.send_run(path)).points == 5
    journal_point(path, point(5), tally(6.0))
    journal_end(path, RunEnd(tally=tally(7.0)))
    for _ in range(2):
        finished = await lab_a.send_run(path)
        assert (finished.points, finished.final.gamma) == (6, {Resource.SECONDS: 7.0})
    assert [p.step for p in await lab_a.list_points(new.id)] == [0, 1, 2, 3, 4, 5]

    journal_end(path, RunEnd(tally=tally(8.0)))
    with pytest.raises(RunFinished):
        await lab_a.send_run(path)
    begin_journal(path, new)  # an old copy, with fewer points than were sent
    with pytest.raises(ConfigurationError, match="an old copy"):
        await lab_a.send_run(path)
    assert find_journal(tmp_path / f"run-{new.id}.jsonl") is not None  # the earlier file was kept


@pytest.mark.parametrize("cut", range(1, 400, 57))
def test_a_journal_cut_off_anywhere_is_read_to_its_last_whole_line_and_goes_on_there(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    begin_journal(path, new_run())
    for number in range(2):
        journal_point(path, point(number), tally(number + 1.0))
    content = path.read_bytes()[:-cut]
    path.write_bytes(content)
    whole = content.count(b"\n") - 1
    assert len(read_journal(path).points) == whole
    journal_point(path, point(7), None)
    kept = read_journal(path)
    assert [p.step for p in kept.points] == [*range(whole), 7]
    assert (kept.tally is None) is (whole == 0)


def bytes_read() -> int:
    """By this process, from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_long_journal_is_not_read_again_for_each_point(tmp_path: Path) -> None:
    path, new = tmp_path / "run.jsonl", new_run()
    begin_journal(path, new)
    with path.open("a") as file:
        for number in range(5000):
            file.write(json.dumps({"point": point(number).model_dump(mode="json"), "tally": None}) + "\n")
    growing = GrowingJournal(path, new.id)
    assert growing.read() == read_journal(path)
    with path.open("ab") as file:
        file.write(b'{"point": {"ste')  # killed in the middle of a line
    began = bytes_read()
    assert len(growing.read().points) == 5000
    journal_point(path, point(5000), tally(1.0))
    kept = growing.read()
    assert bytes_read() - began < path.stat().st_size / 5
    assert kept == read_journal(path)
    begin_journal(path, new_run())  # another begins in its file
    assert growing.read().points == kept.points
    (tmp_path / f"run-{new.id}.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=f"does not hold the run {new.id}"):
        growing.read()


def test_what_is_no_journal_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert find_journal(path) is None
    path.write_text('{"run": ')  # killed in its first line
    assert find_journal(path) is None
    for content in ("{}\n", "hello\n", '{"point": 1}\n', ""):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match="no journal"):
            read_journal(path)


def test_two_runs_of_one_id_do_not_mix(server: Server, tmp_path: Path) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        handle, other = (client.report_run("t", "m", metric="loss", run_id=uuid.UUID(int=7)) for _ in range(2))
        handle.append(1, 5.0, {"seconds": 1.0})
        with pytest.raises(RunConflict):
            other.append(1, 4.0, {"seconds": 1.0})


# --- commands


def test_the_commands_rank_list_and_send(blueprints: Run, server: Server, tmp_path: Path) -> None:
    path, new = tmp_path / "run.jsonl", new_run(seed=3)
    begin_journal(path, new)
    for number in range(3):
        journal_point(path, point(number), tally(number + 1.0))
    assert "3 points and is not finished" in blueprints("send-run", path).stdout
    assert "running" in blueprints("runs").stdout
    journal_end(path, RunEnd(tally=tally(1.0)))
    assert json.loads(blueprints("send-run", path, "--json").stdout)["id"] == str(new.id)
    assert str(new.id) in blueprints("runs", "t", "--model", "m").stdout
    shown = blueprints("leaderboard", "t", "--resource", "seconds", "--psi", "8.5").stdout
    assert "seconds to reach 8.5 (measured: given)" in shown
    assert "tally_below_curve" in shown
    board = json.loads(blueprints("leaderboard", "t", "--resource", "seconds", "--json").stdout)
    assert board["groups"][0]["entries"][0]["value"] == 7.0
    assert "left out: 1 not_read" in blueprints("leaderboard", "t").stdout
    nothing = blueprints("leaderboard", "nope/loss").stdout
    assert nothing == "no runs of nope/loss: `blueprints runs` lists what there is, with its tasks\n"
