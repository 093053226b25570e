"""Backup, disaster, restoration; and `verify`, which finds what is no longer as it was."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import backup, maintenance
from app.backup import UNFINISHED, BackupFailed, back_up, restore
from app.database import create_engine, create_sessions
from app.registry.blobs import blob_path
from app.registry.file_store import open_store
from app.registry.verification import verify
from app.settings import Settings
from gradient_blueprints import Client, Scope
from tests.conftest import execute, make_settings, serving
from tests.documents import PAPER_EXAMPLE

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = b"what a lab trains on, " * 50_000
BLOB = b"factors " * 20_000


@dataclass(frozen=True)
class Kept:
    """A registry with something of every kind in it."""

    settings: Settings
    key: str
    digests: tuple[str, ...]
    blobs: tuple[str, ...]


@pytest.fixture
def kept(settings: Settings, tmp_path: Path) -> Iterator[Kept]:
    with serving(settings) as server:
        key = server.key("lab-a", Scope.READ, Scope.PUBLISH, Scope.PROFILE)
        with Client(server.url, api_key=key, cache=False) as client:
            published = [
                client.publish_blueprint({**PAPER_EXAMPLE, "training_checkpoint": fraction}).digest
                for fraction in (0.4, 0.8, 1.0)
            ]
            blobs = [
                client.upload_blob(write(tmp_path / f"blob-{number}", BLOB + b"." * number)) for number in range(3)
            ]
            for number in range(2):
                text = write(tmp_path / f"text-{number}.txt", TEXT)
                client.upload_checkpoint_file(text, "foundation-7b", 0.8)
        yield Kept(settings, key, tuple(published), tuple(blob.digest for blob in blobs))


@pytest.fixture
def elsewhere(empty_database_url: str, settings: Settings, tmp_path: Path) -> Settings:
    """A registry with the same secret on another machine, where there is nothing yet."""
    return make_settings(empty_database_url, tmp_path / "elsewhere").model_copy(update={"secret": settings.secret})


def faults(settings: Settings) -> list[str]:
    async def find() -> list[str]:
        engine = create_engine(settings)
        try:
            store = open_store(settings.checkpoint_location)
            found = [checked async for checked in verify(create_sessions(engine), settings.store, store)]
        finally:
            await engine.dispose()
        assert [checked.count for checked in found] == [3, 3, 3, 2]
        return [fault for checked in found for fault in checked.faults]

    return asyncio.run(find())


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def run_command(settings: Settings, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "BLUEPRINTS_DATABASE_URL": settings.database_url,
        "BLUEPRINTS_SECRET": settings.secret.get_secret_value(),
        "BLUEPRINTS_STORE": str(settings.store),
    }
    command = [sys.executable, "-m", "app", *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def run_on_data_directory(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """With no setting but --data-dir."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
    command = [sys.executable, "-m", "app", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_after_a_disaster_the_commands_bring_back_every_byte_and_every_key(
    kept: Kept, elsewhere: Settings, tmp_path: Path
) -> None:
    made = run_command(kept.settings, "backup", tmp_path / "backup")
    assert made.returncode == 0, made.stderr
    for path in files(kept.settings.store):
        path.unlink()
    execute(kept.settings.database_url, "DROP SCHEMA public CASCADE")

    restored = run_command(elsewhere, "restore", tmp_path / "backup")
    assert restored.returncode == 0, restored.stderr
    assert restored.stdout.splitlines() == [
        restored.stdout.splitlines()[0],
        "3 versions: 0 faults",
        f"3 attachments, {3 * len(BLOB) + 3:,} bytes: 0 faults",
        f"2 checkpoint files, {2 * len(TEXT):,} bytes: 0 faults",
    ]
    assert restored.stdout.startswith("3 documents, ")
    with serving(elsewhere) as server, Client(server.url, api_key=kept.key, cache=False) as client:
        assert [client.fetch_blueprint("foundation-7b", each).digest for each in (0.4, 0.8, 1.0)] == list(kept.digests)
        assert client.fetch_blob(kept.blobs[0], tmp_path / "again").read_bytes() == BLOB
        file, _ = client.list_checkpoint_files("foundation-7b", 0.8)
        assert client.fetch_checkpoint_file("foundation-7b", 0.8, file, tmp_path / "text").read_bytes() == TEXT
        # The sequences stand where they stood: what comes next gets the next number.
        assert client.publish_blueprint({**PAPER_EXAMPLE, "extra": {"after": "restoration"}}).version == 2


def test_a_backup_adds_what_is_new_and_keeps_the_newest_dumps(kept: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    back_up(kept.settings, folder, keep=2)
    copied = {path: path.stat().st_mtime_ns for path in files(folder / "blobs")}
    (older, newer) = (folder / "database" / f"20{year}-01-01T00-00-00Z.dump" for year in (20, 99))
    older.touch()
    newer.touch()
    newest = back_up(kept.settings, folder, keep=2)
    assert files(folder / "database") == sorted([newest, newer])
    assert {path: path.stat().st_mtime_ns for path in files(folder / "blobs")} == copied


def test_a_backup_that_broke_off_is_finished_by_the_next_and_never_restored(
    kept: Kept, elsewhere: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "backup"
    with pytest.raises(BackupFailed, match="pg_dump ended with status 1"):
        back_up(kept.settings.model_copy(update={"database_url": f"{kept.settings.database_url}_gone"}), folder, keep=2)
    (folder / "database" / f"2020-01-01T00-00-00Z.dump{UNFINISHED}").write_bytes(b"half of a du")
    with pytest.raises(BackupFailed, match="holds no finished backup"):
        restore(elsewhere, folder)
    back_up(kept.settings, folder, keep=2)
    blob, *_ = files(folder / "blobs")
    blob.write_bytes(BLOB[:1_000])  # as a copy that was cut short would leave it, had it this name already
    back_up(kept.settings, folder, keep=2)
    restore(elsewhere, folder)
    assert faults(elsewhere) == []


def test_of_two_backups_at_once_the_second_is_refused(kept: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    back_up(kept.settings, folder, keep=1)
    before = files(folder)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BackupFailed, match="another backup is being added"):
            back_up(kept.settings, folder, keep=1)
        assert files(folder) == before
    back_up(kept.settings, folder, keep=1)


def test_a_database_that_is_in_use_is_left_alone(kept: Kept, tmp_path: Path) -> None:
    back_up(kept.settings, tmp_path / "backup", keep=2)
    with pytest.raises(BackupFailed, match="into an empty database only"):
        restore(kept.settings, tmp_path / "backup")
    assert faults(kept.settings) == []


def test_a_data_directory_that_is_mistyped_or_not_mounted_is_neither_backed_up_nor_made(tmp_path: Path) -> None:
    mistyped, unmounted = tmp_path / "mistyped", tmp_path / "unmounted"
    unmounted.mkdir()
    for data_dir, reason in ((mistyped, "there is no directory"), (unmounted, "holds no database")):
        for command in (["backup", tmp_path / "backup"], ["verify"]):
            refused = run_on_data_directory(*command, "--data-dir", data_dir)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert reason in refused.stderr
    assert list(tmp_path.rglob("*")) == [unmounted]


def test_a_secret_is_read_and_never_made(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    monkeypatch.setenv("BLUEPRINTS_DATABASE_URL", kept.settings.database_url)
    monkeypatch.setenv("BLUEPRINTS_STORE", str(kept.settings.store))
    monkeypatch.setenv("BLUEPRINTS_SECRET", "")
    arguments = Namespace(command="backup", folder=tmp_path / "backup", data_dir=data_dir, keep=2, dump=None)
    assert maintenance.run(arguments) == 1
    monkeypatch.setenv("BLUEPRINTS_SECRET", kept.settings.secret.get_secret_value())
    assert maintenance.run(arguments) == 0
    assert not (data_dir / "secret").exists()


def test_another_registry_is_not_backed_up_over_the_only_copy_of_a_secret(kept: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    back_up(kept.settings, folder, keep=1, secrets=[write(tmp_path / "secret", b"the registry's\n")])
    before = files(folder)
    with pytest.raises(BackupFailed, match="two registries"):
        back_up(kept.settings, folder, keep=1, secrets=[write(tmp_path / "secret", b"another\n")])
    assert files(folder) == before
    assert (folder / "secrets" / "secret").read_bytes() == b"the registry's\n"


def test_a_database_without_a_registry_takes_no_place_among_the_dumps(
    kept: Kept, elsewhere: Settings, tmp_path: Path
) -> None:
    dump = back_up(kept.settings, tmp_path / "backup", keep=1)
    with pytest.raises(BackupFailed, match="holds no registry"):
        back_up(elsewhere, tmp_path / "backup", keep=1)
    assert files(tmp_path / "backup" / "database") == [dump]


def test_the_data_directory_of_another_registry_is_left_alone(tmp_path: Path) -> None:
    folder, data_dir = tmp_path / "backup", tmp_path / "data"
    for place in (folder / "database", folder / "secrets", data_dir):
        place.mkdir(parents=True)
    write(folder / "database" / "2026-11-22T09-31-05Z.dump", b"a dump")
    for name in ("secret", "admin.key", "worker.key"):
        write(folder / "secrets" / name, b"the backup's")
        write(data_dir / name, b"the live registry's")
    refused = run_on_data_directory("restore", folder, "--data-dir", data_dir)
    assert refused.returncode == 1
    assert "two registries" in refused.stderr
    assert {path.name: path.read_bytes() for path in files(data_dir)} == dict.fromkeys(
        ("admin.key", "secret", "worker.key"), b"the live registry's"
    )


def test_a_folder_without_a_backup_leaves_a_new_data_directory_unmade(tmp_path: Path) -> None:
    refused = run_on_data_directory("restore", tmp_path / "mistyped", "--data-dir", tmp_path / "data")
    assert refused.returncode == 1
    assert "holds no finished backup" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("setting", "lacking"), [("store", 5), ("checkpoint_store", 2)])
def test_files_that_are_not_where_the_settings_say_fail_the_backup(
    kept: Kept, tmp_path: Path, setting: str, lacking: int
) -> None:
    default = {"store": tmp_path / "default", "checkpoint_store": str(tmp_path / "default")}[setting]
    elsewhere = kept.settings.model_copy(update={setting: default})
    older = tmp_path / "backup" / "database" / "2020-01-01T00-00-00Z.dump"
    older.parent.mkdir(parents=True)
    older.touch()
    with pytest.raises(BackupFailed, match=f"^{lacking} of 5 files .* BLUEPRINTS_STORE"):
        back_up(elsewhere, tmp_path / "backup", keep=1)
    of_before, dump = files(older.parent)
    assert of_before == older
    assert dump.stat().st_size > 1_000


def test_a_file_that_is_cut_short_in_the_store_fails_the_backup(kept: Kept, tmp_path: Path) -> None:
    cut = blob_path(kept.settings.store, kept.blobs[0])
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(BackupFailed, match=f"^1 of 5 files .* the first {cut.name}"):
        back_up(kept.settings, tmp_path / "backup", keep=1)


def test_a_file_that_is_cut_short_in_the_store_leaves_its_copy_whole(kept: Kept, tmp_path: Path) -> None:
    back_up(kept.settings, tmp_path / "backup", keep=1)
    in_store, in_backup = (blob_path(folder, kept.blobs[0]) for folder in (kept.settings.store, tmp_path / "backup"))
    whole = in_backup.read_bytes()
    in_store.write_bytes(whole[:-1])
    back_up(kept.settings, tmp_path / "backup", keep=1)
    assert in_backup.read_bytes() == whole
    in_store.write_bytes(whole)
    in_backup.write_bytes(whole[:-1])
    back_up(kept.settings, tmp_path / "backup", keep=1)
    assert in_backup.read_bytes() == whole


def test_a_file_that_its_lab_deletes_meanwhile_does_not_fail_the_backup(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, _ = files(kept.settings.store / "checkpoints" / "files")

    def copy_late(source: Path, target: Path, **kept_files: Mapping[Path, int]) -> None:
        execute(kept.settings.database_url, f"DELETE FROM checkpoint_files WHERE place = '{gone.name}'")
        gone.unlink(missing_ok=True)
        copy(source, target, **kept_files)

    copy = backup._copy
    monkeypatch.setattr(backup, "_copy", copy_late)
    assert back_up(kept.settings, tmp_path / "backup", keep=1).exists()


def change(kept: Kept, table: str, statement: str) -> None:
    """As nobody but the owner of the database can: what is immutable is guarded by triggers."""
    execute(
        kept.settings.database_url,
        f"ALTER TABLE {table} DISABLE TRIGGER ALL",
        statement,
        f"ALTER TABLE {table} ENABLE TRIGGER ALL",
    )


def flip_document(kept: Kept, digest: str) -> None:
    where = f"WHERE digest = '\\x{digest.removeprefix('sha256:')}'"
    change(kept, "documents", f"UPDATE documents SET body = set_byte(body, 9, get_byte(body, 9) # 1) {where}")


def lose_layer(kept: Kept, digest: str) -> None:
    document = f"(SELECT id FROM documents WHERE digest = '\\x{digest.removeprefix('sha256:')}')"
    change(kept, "layers", f"DELETE FROM layers WHERE position = 1 AND document_id = {document}")


def test_verify_names_what_is_damaged_and_nothing_else(kept: Kept) -> None:
    assert faults(kept.settings) == []
    flip_document(kept, kept.digests[0])
    lose_layer(kept, kept.digests[1])
    change(kept, "checkpoints", "UPDATE checkpoints SET last_version = 2 WHERE fraction = 1.0")
    flipped, cut, gone = (blob_path(kept.settings.store, digest) for digest in kept.blobs)
    flip(flipped)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    flipped_text, gone_text = files(kept.settings.store / "checkpoints" / "files")
    flip(flipped_text)
    gone_text.unlink()
    expected = [
        f"document {kept.digests[0]}: its bytes have the digest sha256:",
        f"document {kept.digests[1]}: 2 of 3 layers",
        "versions of foundation-7b at 1: 1 of them up to 1, 2 were given out",
        f"attachment {kept.blobs[0]}: its bytes have the digest sha256:",
        f"attachment {kept.blobs[1]}: has {len(BLOB)} bytes, recorded as {len(BLOB) + 1}",
        f"attachment {kept.blobs[2]}: missing",
        f"of foundation-7b at 0.8, {flipped_text.name} in the store: its bytes have the digest sha256:",
        f"of foundation-7b at 0.8, {gone_text.name} in the store: cannot be read: ",
    ]
    found = faults(kept.settings)
    assert len(found) == len(expected)
    assert [start for start in expected if not any(start in fault for fault in found)] == []


def test_the_command_verify_fails_when_there_is_a_fault(kept: Kept) -> None:
    flip_document(kept, kept.digests[0])
    found = run_command(kept.settings, "verify")
    assert found.returncode == 1
    assert found.stdout.startswith(f"FAULT document {kept.digests[0]}: its bytes have the digest sha256:")


# --- deploy/restore.sh and backup.sh, with an `echo` for docker compose: what they do besides


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts, and beside it a backup."""
    (tmp_path / "checkout" / "deploy").mkdir(parents=True)
    for script in ("restore.sh", "backup.sh"):
        shutil.copy(REPOSITORY / "deploy" / script, tmp_path / "checkout" / "deploy")
    for name in ("database", "secrets"):
        (tmp_path / "backup" / name).mkdir(parents=True)
    write(tmp_path / "backup" / "database" / "2026-11-22T09-31-05Z.dump", b"a dump")
    write(tmp_path / "backup" / "secrets" / "secret", b"the backup's")
    return tmp_path / "checkout"


def run_script(name: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", checkout / "deploy" / name, checkout.parent / "backup"],
        env=os.environ | {"COMPOSE": "echo compose"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_refuses_a_secret_with_which_no_restored_key_is_valid(checkout: Path) -> None:
    (checkout / "secrets").mkdir()
    for kept in (b"another", None):
        if kept is None:
            (checkout / "secrets" / "secret").unlink()
        else:
            write(checkout / "secrets" / "secret", kept)
        refused = run_script("restore.sh", checkout)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "mv secrets secrets.old" in refused.stderr
    (checkout / "secrets").rename(checkout / "secrets.old")
    for _ in range(2):  # once it takes those of the backup, then it finds them
        restored = run_script("restore.sh", checkout)
        assert restored.returncode == 0, restored.stderr
        assert "compose up -d postgres\n" in restored.stdout
        assert (checkout / "secrets" / "secret").read_bytes() == b"the backup's"


def test_the_script_backs_no_other_registry_up_over_the_only_copy_of_a_secret(checkout: Path) -> None:
    secret, backup = checkout / "secrets" / "secret", checkout.parent / "backup"
    secret.parent.mkdir()
    before = files(backup)
    for kept in (b"another", None):
        if kept is None:
            secret.unlink()
        else:
            write(secret, kept)
        refused = run_script("backup.sh", checkout)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "two registries" in refused.stderr
        assert files(backup) == before
        assert (backup / "secrets" / "secret").read_bytes() == b"the backup's"
    write(secret, b"the backup's")
    write(secret.with_name("admin_key"), b"of now")
    assert run_script("backup.sh", checkout).returncode == 0
    assert (backup / "secrets" / "admin_key").read_bytes() == b"of now"


def test_each_run_of_the_script_writes_a_dump_of_its_own_and_leaves_no_half_of_one(checkout: Path) -> None:
    (checkout / "secrets").mkdir()
    write(checkout / "secrets" / "secret", b"the backup's")
    told = [run_script("backup.sh", checkout).stdout for _ in range(2)]
    dumps = {re.search(r"--dump /backup/database/(\S+)", text)[1] for text in told}  # type: ignore[index]
    assert len(dumps) == 2
    assert [path.name for path in (checkout.parent / "backup" / "database").iterdir()] == ["2026-11-22T09-31-05Z.dump"]
