"""docs/sdk.md is true: its Python runs in order against the real service, and it names every command and variable."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gradient_blueprints import Blueprint, Client, Scope
from gradient_blueprints.commands import app
from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document

PAGE = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")


@pytest.fixture
def worker(server: Server) -> Iterator[None]:
    """Finishes what is submitted, as a worker would."""
    stop = threading.Event()

    def work() -> None:
        with Client(server.url, api_key=server.key("worker", Scope.WORK), cache=False) as client:
            while not stop.wait(0.1):
                for job in client.list_jobs("queued"):
                    token = client.claim_job(job.id).lease_token
                    document = blueprint_document(job.model_id, job.training_checkpoint)
                    client.finish_job(job.id, token, Blueprint.from_dict(document))

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("worker")
def test_the_python_of_the_page_runs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLUEPRINTS_URL", server.url)
    monkeypatch.setenv("BLUEPRINTS_API_KEY", server.key("lab-a"))
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path / "docs-cache"))
    Path("blueprint.json").write_text(json.dumps(PAPER_EXAMPLE))
    Path("factors.safetensors").write_bytes(b"factors" * 1000)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    names: dict[str, object] = {}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/sdk.md, block {number}", "exec"), names)
    finally:
        client = names.get("client")
        if isinstance(client, Client):
            client.close()


def test_the_page_names_every_method() -> None:
    methods = {name for name in dir(Client) if not name.startswith("_")}
    assert [name for name in sorted(methods) if f"`{name}`" not in PAGE and f"client.{name}(" not in PAGE] == []


def test_the_page_names_every_option_of_submit_and_select() -> None:
    group: Any = get_command(app)
    chosen = [group.commands["submit"], group.commands["select"]]
    options = {option for command in chosen for each in command.params for option in each.opts if option[:2] == "--"}
    assert [option for option in sorted(options) if option not in PAGE] == []


def test_the_page_names_every_command() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert [name for name in commands if not re.search(rf"\b{name}\b", PAGE)] == []
