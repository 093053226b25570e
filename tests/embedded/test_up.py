"""`python -m app up` as an operator runs it: real processes, watched from outside."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from app.embedded import postgres, valkey
from app.embedded.processes import end_left_behind, left_behind
from app.registry.keys import generate_secret
from tests.documents import PAPER_EXAMPLE
from tests.embedded.conftest import REPOSITORY, Up

RunUp = Callable[..., Up]

KEY = re.compile(r"gbr_[A-Za-z0-9_-]{43}_[0-9a-f]{6}")


def find(up: Up, name: str) -> psutil.Process | None:
    """The process of `python -m app NAME` or `python -m NAME`, or of a server's program of that name."""
    for process in up.family():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if process.name() == name or command[2:4] == ["app", name] or command[2:3] == [name]:
                return process
    return None


def named(up: Up, name: str) -> psutil.Process:
    process = find(up, name)
    assert process is not None, f"no {name} runs"
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_lab(up: Up, name: str) -> None:
    assert up.post("/v1/labs", {"name": name}).status_code == 201


def labs(up: Up) -> set[str]:
    return {lab["name"] for lab in up.get("/v1/labs").json()["labs"]}


@pytest.fixture(scope="module")
def running() -> Iterator[Up]:
    """One `up` for the tests that only look at it."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    up = Up(folder / "data")
    try:
        yield up.wait_until_serving()
    finally:
        up.close()
        end_left_behind(folder / "data")
        shutil.rmtree(folder)


def test_everything_runs(running: Up) -> None:
    for name in ("postgres", "valkey-server", "serve", "relay", "worker"):
        named(running, name)
    assert running.get("/readyz").status_code == 200


def test_the_worker_may_work_and_knows_neither_database_nor_admin_key(running: Up) -> None:
    environment = named(running, "worker").environ()
    assert not {"BLUEPRINTS_DATABASE_URL", "BLUEPRINTS_SECRET", "BLUEPRINTS_ADMIN_KEY"} & environment.keys()
    assert running.get("/v1/whoami", environment["BLUEPRINTS_API_KEY"]).json()["scopes"] == ["work"]
    assert environment["BLUEPRINTS_URL"] == running.url
    assert environment["BLUEPRINTS_ALLOWED_ROOTS"] == str(running.data_dir / "sources")
    assert environment["BLUEPRINTS_API_KEY"] not in running.output


def test_a_backup_of_the_running_service_becomes_another_data_directory(running: Up, private_folder: Path) -> None:
    assert running.post("/v1/blueprints", PAPER_EXAMPLE).status_code == 201
    backup, restored = private_folder / "backup", private_folder / "restored"

    def run(*arguments: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        command = [sys.executable, "-m", "app", *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("backup", backup, "--data-dir", running.data_dir).startswith(f"backed up to {backup}/database/")
    assert running.get("/readyz").status_code == 200
    # Without `up` a command runs the database for as long as it needs it.
    found = run("restore", backup, "--data-dir", restored)
    assert found.startswith("1 documents")
    assert found.splitlines()[1:] == ["1 versions: 0 faults", "0 attachments: 0 faults", "0 checkpoint files: 0 faults"]
    assert not (restored / "postgres" / "data" / "postmaster.pid").exists()
    for name in ("admin.key", "secret"):
        assert (restored / name).read_text() == (running.data_dir / name).read_text()
        assert stat.S_IMODE((restored / name).stat().st_mode) == 0o600


def test_a_second_up_on_the_same_directory_is_told_who_holds_it(running: Up, run_up: RunUp) -> None:
    second = run_up(running.data_dir, "--no-worker")
    assert second.process.wait(30) == 1
    assert f"is in use by process {running.process.pid}, which serves {running.url} since 20" in second.output
    assert running.get("/readyz").status_code == 200


def test_a_port_in_use_is_said_before_anything_starts(running: Up, private_folder: Path, run_up: RunUp) -> None:
    port = running.url.rpartition(":")[2]
    second = run_up(private_folder / "other", "--no-worker", "--port", port)
    assert second.process.wait(30) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.output
    assert not (private_folder / "other" / "postgres").exists()


def test_ctrl_c_leaves_nothing_running_and_the_keys_stay(private_folder: Path, run_up: RunUp) -> None:
    first = run_up(private_folder / "data").wait_until_serving()
    assert KEY.findall(first.output) == [first.admin_key]
    assert stat.S_IMODE((first.data_dir / "admin.key").stat().st_mode) == 0o600
    assert "admin" in first.get("/v1/whoami").json()["scopes"]
    worker_key = named(first, "worker").environ()["BLUEPRINTS_API_KEY"]
    family = first.family()
    assert first.interrupt() == 0
    assert [process for process in family if process.is_running()] == []
    assert left_behind(first.data_dir) == []
    assert first.output.endswith("stopped\n")

    second = run_up(first.data_dir).wait_until_serving()
    assert KEY.findall(second.output) == []
    assert second.get("/v1/whoami").status_code == 200
    assert named(second, "worker").environ()["BLUEPRINTS_API_KEY"] == worker_key


def test_an_admin_key_of_the_environment_is_used_and_not_written_down(private_folder: Path, run_up: RunUp) -> None:
    key = generate_secret()
    up = run_up(private_folder / "data", "--no-worker", BLUEPRINTS_ADMIN_KEY=key).wait_until_serving()
    assert "admin" in up.get("/v1/whoami", key).json()["scopes"]
    assert not (up.data_dir / "admin.key").exists()
    assert key not in up.output


def test_after_a_kill_nothing_stays_and_the_next_up_has_the_data(private_folder: Path, run_up: RunUp) -> None:
    first = run_up(private_folder / "data").wait_until_serving()
    make_lab(first, "acme")
    first.process.kill()
    first.process.wait()
    wait_until(lambda: left_behind(first.data_dir) == [])
    second = run_up(first.data_dir).wait_until_serving()
    assert "acme" in labs(second)


def test_the_next_up_ends_what_is_left_when_the_guard_was_killed_as_well(private_folder: Path, run_up: RunUp) -> None:
    first = run_up(private_folder / "data", "--no-worker").wait_until_serving()
    make_lab(first, "acme")
    family = first.family()
    guard = named(first, "app.embedded.guard")
    guard.kill()
    first.process.kill()
    first.process.wait()
    leftover = [process for process in family if process != guard]
    assert all(process.is_running() for process in leftover if process.name() in ("postgres", "valkey-server"))
    second = run_up(first.data_dir, "--no-worker").wait_until_serving()
    assert "killed without warning" in second.output
    assert [process for process in leftover if process.is_running()] == []
    assert "acme" in labs(second)


def test_a_process_that_dies_is_started_again(private_folder: Path, run_up: RunUp) -> None:
    up = run_up(private_folder / "data", "--no-worker").wait_until_serving()
    for name in ("serve", "relay", "valkey-server", "postgres"):
        before = named(up, name)
        before.kill()
        wait_until(lambda name=name, before=before: find(up, name) not in (None, before))  # type: ignore[misc]
        wait_until(lambda: is_ready(up))


def is_ready(up: Up) -> bool:
    try:
        return up.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False  # requests that the dying API had taken on


def test_given_servers_replace_the_embedded_ones(private_folder: Path, run_up: RunUp) -> None:
    database = postgres.start(private_folder / "postgres", durable=False)
    broker = valkey.start(private_folder / "valkey", durable=False)
    try:
        up = run_up(
            private_folder / "data",
            "--no-worker",
            BLUEPRINTS_DATABASE_URL=database.url,
            BLUEPRINTS_BROKER_URL=broker.url,
        ).wait_until_serving()
        make_lab(up, "acme")
        assert {process.name() for process in up.family()}.isdisjoint({"postgres", "valkey-server"})
        assert not (up.data_dir / "postgres").exists()
        assert not (up.data_dir / "valkey").exists()
        assert up.interrupt() == 0
        assert database.process.poll() is None
        assert broker.process.poll() is None
    finally:
        valkey.stop(broker)
        postgres.stop(database)


def test_a_database_out_of_reach_ends_the_start_with_a_reason(private_folder: Path, run_up: RunUp) -> None:
    url = "postgresql://nobody:none@127.0.0.1:1/none"
    up = run_up(private_folder / "data", "--no-worker", BLUEPRINTS_DATABASE_URL=url)
    assert up.process.wait(60) == 1
    assert "could not be brought up to date" in up.output
    assert left_behind(private_folder / "data") == []


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_the_start_leaves_nothing_running(
    private_folder: Path, run_up: RunUp, stop: signal.Signals
) -> None:
    up = run_up(private_folder / "data")
    wait_until(lambda: (private_folder / "data" / "valkey").exists())
    up.process.send_signal(stop)
    assert up.process.wait(60) == 0
    assert left_behind(private_folder / "data") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
def test_an_ordinary_user_runs_it_too(private_folder: Path, run_up: RunUp) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("UNTESTED as ordinary user: setpriv is not installed")
    # Python or the repository may lie where only root can read, say below /root. The right to read, and it alone, can
    # be kept when root becomes someone else; it gives away no file, starts no Postgres and changes no owner.
    plain = (setpriv, "--reuid=65534", "--regid=65534", "--clear-groups")
    reading = (*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    for become in (plain, reading):
        command = (*become, "--", sys.executable)
        ask = [*command, "-c", "import app.embedded.supervisor, asyncpg"]
        tried = subprocess.run(ask, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        if tried.returncode == 0:
            break
    else:
        pytest.skip(f"UNTESTED as ordinary user, who cannot use {sys.executable}: {tried.stderr[-300:]}")
    os.chown(private_folder, 65534, 65534)
    up = run_up(private_folder / "data", "--no-worker", command=command, HOME=str(private_folder)).wait_until_serving()
    assert stat.S_IMODE(private_folder.stat().st_mode) == 0o700
    assert {process.uids().real for process in up.family()} == {65534}
    assert up.get("/readyz").status_code == 200
    assert up.interrupt() == 0
    assert left_behind(up.data_dir) == []
