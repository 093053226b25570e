"""docker-compose.yml keeps what docs/operating.md promises; that it runs, `python -m deploy.rehearsal` shows."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api.application import CURRENT
from app.settings import Settings
from worker.settings import WorkerSettings

REPOSITORY = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LASTING = sorted(SERVICES.keys() - {"migrate"})


def test_the_gateway_alone_publishes_a_port() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]


@pytest.mark.parametrize("name", LASTING)
def test_a_service_starts_again_and_its_memory_and_its_logs_are_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["cap_drop"] == ["ALL"]


def test_workers_share_no_network_with_the_database_and_hold_none_of_its_secrets() -> None:
    for name in ("worker", "worker-gpu"):
        assert set(SERVICES[name]["networks"]).isdisjoint(SERVICES["postgres"]["networks"])
        assert [secret["source"] for secret in SERVICES[name]["secrets"]] == ["worker_key"]


def test_a_gateway_that_is_stopped_has_time_to_finish_what_is_under_way() -> None:
    gateway = (REPOSITORY / "Dockerfile").read_text().partition(" AS gateway\n")[2]
    assert "\nSTOPSIGNAL SIGUSR1\n" in gateway.partition("\nFROM ")[0]
    assert SERVICES["gateway"]["stop_grace_period"] == "30s"
    assert SERVICES["gateway"]["init"] is True  # which passes the signal on


def test_the_database_takes_the_connections_of_as_many_apis_as_the_gateway_finds() -> None:
    settings = Settings.model_construct()
    pool = settings.pool_size + settings.pool_overflow
    further = len(CURRENT) + 1  # and one that listens
    assert f"{further} more" in (Settings.model_fields["pool_size"].description or "")
    api, relay, others = pool + settings.aggregations + further, pool + 2, 10  # others: migrate, backup, verify, psql
    found = re.search(r"server-template api 1-(\d+) ", (REPOSITORY / "deploy" / "haproxy.cfg").read_text())
    assert found is not None
    apis = int(found[1])
    *_, limit = SERVICES["postgres"]["command"]
    assert apis * api + relay + others <= int(limit.removeprefix("max_connections="))
    told = " ".join((REPOSITORY / "docs" / "operating.md").read_text().split())
    assert f"up to {apis} APIs" in told
    assert f"an API holds up to {api} connections" in told
    assert f"and a relay {relay};" in told


def test_only_settings_that_exist_are_set() -> None:
    known = {f"BLUEPRINTS_{name.upper()}" for settings in (Settings, WorkerSettings) for name in settings.model_fields}
    known |= {"BLUEPRINTS_SECRETS_DIR"}
    named = {name for service in SERVICES.values() for name in service.get("environment", {})}
    named |= set(re.findall(r"(BLUEPRINTS_\w+)=", (REPOSITORY / "Dockerfile").read_text()))
    assert {name for name in named if name.startswith("BLUEPRINTS_")} - known == set()


def test_every_image_is_a_target_of_the_dockerfile_and_every_secret_is_made() -> None:
    targets = set(re.findall(r"^FROM .* AS ([\w-]+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE))
    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} <= targets
    made = re.search(r"for name in (.+); do \\\n.*secrets/", (REPOSITORY / "Makefile").read_text())
    assert made is not None
    assert set(made.group(1).split()) == COMPOSE["secrets"].keys()


def test_secrets_are_in_a_closed_folder_and_readable_within_it_whatever_the_umask(tmp_path: Path) -> None:
    make = ["make", "-f", str(REPOSITORY / "Makefile"), "-C", str(tmp_path), "secrets"]
    subprocess.run(make, umask=0o077, capture_output=True, check=True)
    made = tmp_path / "secrets"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o644}
    assert {path.name for path in made.iterdir()} == COMPOSE["secrets"].keys()
    before = {path: path.read_text() for path in made.iterdir()}
    made.chmod(0o755)
    for path in before:
        path.chmod(0o600)
    subprocess.run(make, umask=0o077, capture_output=True, check=True)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {path: path.read_text() for path in made.iterdir()} == before
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o644}


def test_a_starting_worker_makes_the_place_for_temporary_files_and_its_image_removes_nothing_there(
    tmp_path: Path,
) -> None:
    of_another = tmp_path / "scratch" / "another" / "file"
    dockerfile = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", "")
    command = re.search(r"^CMD (\[.*python -m worker.*\])$", dockerfile, re.MULTILINE)
    assert command is not None
    script = json.loads(command.group(1))[2].replace("/data/cache", str(tmp_path)).replace("python -m worker", "env")
    for _ in range(2):
        started = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert f"TMPDIR={tmp_path / 'scratch'}\n" in started.stdout
        of_another.parent.mkdir(exist_ok=True)
        of_another.touch()
        os.utime(of_another.parent, (0, 0))
    assert of_another.exists()
