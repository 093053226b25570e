"""What the database itself guarantees, and what a failing commit is answered with."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import httpx2
import pytest
from alembic import command

from app.database import alembic_config, migrate
from app.embedded import postgres
from app.settings import Settings, read_settings
from gradient_blueprints.errors import ConfigurationError
from tests.conftest import execute, make_settings, serving
from tests.documents import PAPER_EXAMPLE, blueprint_document

IMMUTABLE = ["documents", "layers", "attachments", "versions", "blobs", "alias_moves", "audit", "job_events"]


@pytest.mark.parametrize("table", IMMUTABLE)
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET {} = {}", "TRUNCATE {} CASCADE"])
def test_stored_content_cannot_be_changed(
    publisher: httpx2.Client, database_url: str, table: str, statement: str
) -> None:
    publisher.post("/v1/blueprints", json=PAPER_EXAMPLE)
    columns = {"layers": "alpha", "attachments": "name", "alias_moves": "moved_at", "audit": "at", "job_events": "at"}
    column = columns.get(table, "created_at")
    target = statement.replace("SET {} = {}", f"SET {column} = {column}").format(table)
    with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
        execute(database_url, target)


def test_a_commit_that_fails_is_never_answered_2xx(publisher: httpx2.Client, database_url: str) -> None:
    execute(
        database_url,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
        "CREATE CONSTRAINT TRIGGER fail_at_commit AFTER INSERT ON versions "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    answer = publisher.post("/v1/blueprints", json=PAPER_EXAMPLE)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    execute(database_url, "DROP TRIGGER fail_at_commit ON versions")
    assert publisher.post("/v1/blueprints", json=PAPER_EXAMPLE).json()["version"] == 1


def test_the_schema_goes_down_and_up_again_and_matches_the_tables(database_url: str) -> None:
    config = alembic_config(database_url)
    command.check(config)
    command.downgrade(config, "base")
    command.upgrade(config, "head")
    command.check(config)


def test_two_servers_starting_at_once_migrate_once(postgres_url: str, empty_database_url: str) -> None:
    code = "import sys; from app.database import migrate; migrate(sys.argv[1])"
    started = [
        subprocess.Popen([sys.executable, "-c", code, empty_database_url], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    migrate(empty_database_url)  # and there is nothing left to do


def test_the_database_of_a_later_release_is_refused_in_words(database_url: str) -> None:
    execute(database_url, "UPDATE alembic_version SET version_num = '9999_later'")
    with pytest.raises(ConfigurationError, match=r"belongs to a later release .*9999_later"):
        migrate(database_url)


def test_readiness_follows_the_database(server_folder: Path, tmp_path: Path) -> None:
    folder = server_folder / "postgres"
    database = postgres.start(folder, durable=False)
    try:
        migrate(database.url)
        with serving(make_settings(database.url, tmp_path)) as server, httpx2.Client(base_url=server.url) as http:
            assert http.get("/readyz").status_code == 200
            assert http.get("/v1/models").status_code == 200
            with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.admin_key}"}) as admin:
                digest = admin.post("/v1/blueprints", json=blueprint_document()).raise_for_status().json()["digest"]
            named = "/v1/models/tiny/checkpoints/0.8/blueprint"
            assert [http.get(path).status_code for path in (f"/v1/blueprints/{digest}", named)] == [200, 200]
            postgres.stop(database)
            until = time.monotonic() + 2.5  # whether it was yanked is looked up once a second
            while time.monotonic() < until:
                assert http.get(f"/v1/blueprints/{digest}").status_code == 200
                time.sleep(0.1)
            assert http.get(named).status_code == 503
            for path in ("/readyz", "/v1/models"):
                gone = http.get(path)
                assert (gone.status_code, gone.json()["code"]) == (503, "service_unavailable")
                assert int(gone.headers["retry-after"]) >= 1
            assert http.get("/livez").status_code == 200
            database = postgres.start(folder, port=database.port, durable=False)
            assert http.get("/readyz").status_code == 200
            assert http.get("/v1/models").status_code == 200
    finally:
        postgres.stop(database)


def test_a_publish_is_visible_to_the_next_fetch_of_another_process(settings: Settings) -> None:
    with serving(settings) as one, serving(settings) as other:
        key = one.key("lab-a")
        path = "/v1/models/tiny/checkpoints/0.8/blueprint"
        with (
            httpx2.Client(base_url=one.url, headers={"Authorization": f"Bearer {key}"}) as writer,
            httpx2.Client(base_url=other.url) as reader,
        ):
            for norm in range(1, 20):
                writer.post("/v1/blueprints", json=blueprint_document(norm=norm)).raise_for_status()
                assert reader.get(path).headers["blueprint-version"] == str(norm)


@pytest.mark.parametrize("setting", ["secret", "admin_key", "worker_key"])
def test_a_secret_that_could_be_guessed_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("BLUEPRINTS_DATABASE_URL", "postgresql://user:the-password@127.0.0.1/x")
    monkeypatch.setenv("BLUEPRINTS_SECRET", "s" * 32)
    monkeypatch.setenv(f"BLUEPRINTS_{setting.upper()}", "hunter2")
    with pytest.raises(ConfigurationError) as refused:
        read_settings()
    assert f"BLUEPRINTS_{setting.upper()}" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_settings_do_not_show_their_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLUEPRINTS_DATABASE_URL", "postgresql://user@127.0.0.1/x")
    monkeypatch.setenv("BLUEPRINTS_SECRETS_DIR", str(tmp_path))
    (tmp_path / "blueprints_secret").write_text("s3cret" * 8)
    (tmp_path / "blueprints_database_password").write_text("the-password")
    settings = read_settings()
    assert settings.database_url == "postgresql://user:the-password@127.0.0.1/x"
    assert "the-password" not in repr(settings)
    assert "s3cret" not in repr(settings)
