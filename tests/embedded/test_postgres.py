"""The embedded PostgreSQL, as a real server."""

import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psutil
import pytest

from app.embedded import postgres
from app.embedded.processes import CannotStart, free_port, left_behind

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to let another account in")

Start = Callable[[Path], postgres.Postgres]


@pytest.fixture
def start() -> "Start":
    return lambda folder: postgres.start(folder / "postgres")


async def run(server: postgres.Postgres, statement: str) -> object:
    connection = await asyncpg.connect(server.url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_serves_a_database_that_sorts_alike_everywhere(private_folder: Path, start: Start) -> None:
    server = start(private_folder)
    try:
        assert await run(server, "SELECT current_database()") == "blueprints"
        assert await run(server, "SHOW server_encoding") == "UTF8"
        assert await run(server, "SELECT string_agg(c, '' ORDER BY c) FROM unnest('{b,A,a,B}'::text[]) c") == "ABab"
        assert await run(server, "SHOW fsync") == "on"
    finally:
        postgres.stop(server)


async def test_demands_its_password(private_folder: Path, start: Start) -> None:
    server = start(private_folder)
    try:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(f"postgresql://blueprints:guess@127.0.0.1:{server.port}/blueprints")
    finally:
        postgres.stop(server)
    assert stat.S_IMODE((private_folder / "postgres" / "password").stat().st_mode) == 0o600


def test_listens_on_the_loopback_address_only(private_folder: Path, start: Start) -> None:
    server = start(private_folder)
    try:
        connections = psutil.Process(server.process.pid).net_connections(kind="all")
        listening = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert {address.ip for address in listening} == {"127.0.0.1"}
    finally:
        postgres.stop(server)


async def test_keeps_its_data_over_a_stop_and_leaves_nothing_running(private_folder: Path, start: Start) -> None:
    server = start(private_folder)
    await run(server, "CREATE TABLE kept AS SELECT 1 AS one")
    postgres.stop(server)
    assert left_behind(private_folder) == []
    server = start(private_folder)
    try:
        assert await run(server, "SELECT one FROM kept") == 1
    finally:
        postgres.stop(server)
    assert "was not properly shut down" not in server.log.read_text()


async def test_recovers_after_a_kill_though_the_stale_pid_is_now_another_program(
    private_folder: Path, start: Start
) -> None:
    server = start(private_folder)
    await run(server, "CREATE TABLE kept AS SELECT 1 AS one")
    pid_file = private_folder / "postgres" / "data" / "postmaster.pid"
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    account = pid_file.stat().st_uid
    # Of the account that Postgres runs as: Postgres takes a living process of another user for no server anyway.
    bystander = psutil.Popen(["sleep", "60"], user=account if os.geteuid() == 0 else None)
    try:
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")
        server = start(private_folder)
        try:
            assert await run(server, "SELECT one FROM kept") == 1
        finally:
            postgres.stop(server)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_ends_a_server_that_a_killed_owner_left_running(private_folder: Path, start: Start) -> None:
    forgotten = start(private_folder)
    await run(forgotten, "CREATE TABLE kept AS SELECT 1 AS one")
    server = start(private_folder)
    try:
        assert forgotten.process.wait(5) == 0
        assert await run(server, "SELECT one FROM kept") == 1
    finally:
        postgres.stop(server)


def test_an_interrupted_first_start_is_made_good(private_folder: Path, start: Start) -> None:
    unfinished = private_folder / "postgres" / "data.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    postgres.stop(start(private_folder))


def test_says_so_when_its_port_is_taken(private_folder: Path) -> None:
    other = postgres.start(private_folder / "other", log=private_folder / "other.log", durable=False)
    try:
        with pytest.raises(CannotStart, match="Address already in use"):
            postgres.start(private_folder / "postgres", port=other.port)
    finally:
        postgres.stop(other)


def test_a_lost_password_is_named_not_replaced(private_folder: Path, start: Start) -> None:
    postgres.stop(start(private_folder))
    (private_folder / "postgres" / "password").unlink()
    with pytest.raises(CannotStart, match="password is missing"):
        start(private_folder)


def test_a_path_longer_than_a_socket_name_may_be(private_folder: Path, start: Start) -> None:
    deep = private_folder / ("x" * 100) / ("y z" * 30)
    deep.mkdir(parents=True)
    postgres.stop(start(deep))


@needs_root
def test_as_root_it_opens_its_parents_for_passing_through_alone_and_says_so(
    private_folder: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(private_folder)
    try:
        assert stat.S_IMODE(private_folder.stat().st_mode) == 0o701
        assert f"made {private_folder} traversable" in caplog.text
        assert psutil.Process(server.process.pid).uids().real != 0
        assert psutil.Process(server.process.pid).gids().real != 0
        status = Path(f"/proc/{server.process.pid}/status")
        if status.exists():
            groups = re.search(r"^Groups:(.*)$", status.read_text(), re.MULTILINE)
            assert groups is not None
            assert groups[1].split() == []
    finally:
        postgres.stop(server)


@needs_root
def test_as_root_it_stays_with_the_owner_of_the_data(private_folder: Path, start: Start) -> None:
    (private_folder / "postgres").mkdir()
    shutil.chown(private_folder / "postgres", "daemon")
    server = start(private_folder)
    try:
        assert psutil.Process(server.process.pid).username() == "daemon"
    finally:
        postgres.stop(server)


@needs_root
def test_data_of_a_user_whom_the_system_does_not_know_is_refused(private_folder: Path, start: Start) -> None:
    (private_folder / "postgres").mkdir()
    os.chown(private_folder / "postgres", 4321, 4321)
    with pytest.raises(CannotStart, match="belongs to user 4321"):
        start(private_folder)


async def test_without_durability_it_flushes_nothing(private_folder: Path) -> None:
    server = postgres.start(private_folder / "postgres", port=free_port(), durable=False)
    try:
        assert await run(server, "SHOW fsync") == "off"
    finally:
        postgres.stop(server)
