"""The command `blueprints` as a process, against the real service."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradient_blueprints import Blueprint, Client, JobOutcome, Progress, Scope
from gradient_blueprints.cli import main
from gradient_blueprints.commands import alias_app, app
from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document


@dataclass
class Done:
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLUEPRINTS_URL", server.url)
    monkeypatch.setenv("BLUEPRINTS_API_KEY", server.key("lab-a"))
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path / "cli-cache"))


@pytest.fixture
def blueprints(environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command with the key of lab-a; `code` is the exit code that it must have."""

    def run(*arguments: object, code: int = 0, **more: str) -> Done:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["blueprints", *map(str, arguments)])
            for name, value in more.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as exited:
                main()
        out, err = capsys.readouterr()
        assert (exited.value.code or 0) == code, out + err
        return Done(out, err)

    return run


@pytest.mark.usefixtures("environment")
def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).with_name("blueprints")), "list", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    again = subprocess.run([*command[:1], "fetch", "tiny", "0.8"], check=False, capture_output=True, text=True)
    assert again.returncode == 1
    assert "Traceback" not in again.stderr


def test_a_blueprint_goes_up_and_comes_down(blueprints: Run, tmp_path: Path) -> None:
    (tmp_path / "blueprint.json").write_text(json.dumps(PAPER_EXAMPLE))
    (published,) = json.loads(blueprints("publish", "blueprint.json", "--json").stdout)
    assert (published["version"], published["created"]) == (1, True)
    assert "Known already: foundation-7b at 0.8 version 1" in blueprints("publish", "blueprint.json").stdout

    assert "out.json: <Blueprint foundation-7b" in blueprints("fetch", "foundation-7b", "0.8", "-o", "out.json").stdout
    assert json.loads((tmp_path / "out.json").read_text()) == PAPER_EXAMPLE
    blueprints("fetch", "foundation-7b", "0.80", "-o", "out.csv", "--version", 1)
    assert Blueprint.from_csv((tmp_path / "out.csv").read_bytes().decode()) == Blueprint.from_dict(PAPER_EXAMPLE)
    assert json.loads(blueprints("fetch", "foundation-7b", "0.8", "--json").stdout) == PAPER_EXAMPLE
    assert "attn.0" in blueprints("fetch", "foundation-7b", "0.8").stdout
    blueprints("fetch", "foundation-7b", "0.8", "--version", 1, BLUEPRINTS_OFFLINE="1")


def test_what_there_is_is_listed_for_people_and_for_programs(blueprints: Run, tmp_path: Path) -> None:
    for norm in (1.0, 2.0):
        (tmp_path / "b.json").write_text(json.dumps(blueprint_document(norm=norm)))
        blueprints("publish", "b.json")
    assert "tiny" in blueprints("list").stdout
    assert [row["model_id"] for row in json.loads(blueprints("list", "tin", "--json").stdout)] == ["tiny"]
    assert json.loads(blueprints("list", "nothing", "--json").stdout) == []
    assert json.loads(blueprints("versions", "tiny", "--json").stdout)[0]["newest"] == 2
    blueprints("yank", "tiny", "0.8", "2", "--reason", "wrong data")
    table = blueprints("versions", "tiny", "0.8").stdout
    digests = [row["digest"] for row in json.loads(blueprints("versions", "tiny", "0.8", "--json").stdout)]
    assert "wrong data" in table
    assert all(digest in table for digest in digests)
    assert "is no longer yanked" in blueprints("unyank", "tiny", "0.8", "2").stdout
    assert not json.loads(blueprints("unyank", "tiny", "0.8", "2", "--json").stdout)["yanked"]
    assert "Spearman" in blueprints("compare", "tiny", "0.8@1", "0.8@2").stdout
    assert json.loads(blueprints("compare", "tiny", "0.8@1", "0.8@2", "--json").stdout)["matched"] == 3


def test_what_others_wrote_is_shown_as_it_is(blueprints: Run, tmp_path: Path) -> None:
    document = blueprint_document()
    document["layers"][0]["id"] = "[red]a:key:b[/]"
    (tmp_path / "b.json").write_text(json.dumps(document))
    blueprints("publish", "b.json")
    assert "[red]a:key:b[/]" in blueprints("fetch", "tiny", "0.8").stdout
    reason = "bug :fire: [bold]x[/y]"
    assert blueprints("yank", "tiny", "0.8", "1", "--reason", reason).stdout.endswith(f"is yanked: {reason}\n")
    assert reason in blueprints("versions", "tiny", "0.8").stdout


def test_an_alias_is_set_listed_and_deleted(blueprints: Run, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(blueprint_document()))
    blueprints("publish", "b.json")
    blueprints("alias", "set", "tiny", "stable", "0.8", "1", "--if-revision", "0")
    assert "stable" in blueprints("alias", "list", "tiny").stdout
    assert json.loads(blueprints("alias", "get", "tiny", "stable", "--json").stdout)["version"] == 1
    assert "is" in blueprints("alias", "set", "tiny", "stable", "0.8", "1", "--if-revision", "0", code=1).stderr
    blueprints("alias", "delete", "tiny", "stable")
    assert len(json.loads(blueprints("alias", "history", "tiny", "stable", "--json").stdout)) == 2


def test_a_job_is_submitted_watched_listed_and_cancelled(blueprints: Run, server: Server) -> None:
    submit = ("submit", "tiny", "0.8", "--source", "/data", "--data", "general=/data/general.txt", "--batches", 2)
    job = json.loads(blueprints(*submit, "--json").stdout)

    def work() -> None:
        with Client(server.url, api_key=server.key("worker", Scope.WORK), cache=False) as worker:
            token = worker.claim_job(job["id"]).lease_token
            for done in range(2):
                worker.heartbeat_job(job["id"], token, Progress(phase="profiling [/b]", done=done, total=2))
                time.sleep(0.2)
            worker.finish_job(job["id"], token, Blueprint.from_dict(blueprint_document()))

    worker = threading.Thread(target=work)
    worker.start()
    watched = blueprints("watch", job["id"]).stdout
    assert "succeeded: tiny at 0.8 version 1" in watched
    assert "2/2" in watched
    worker.join()
    events = [json.loads(line) for line in blueprints("watch", job["id"], "--json").stdout.splitlines()]
    assert events[-1]["state"] == "succeeded"

    options = ("--granularity", "block", "--statistic", "median", "--time-limit", 60)
    second = json.loads(blueprints(*submit, *options, "--shards", 2, "--json").stdout)
    assert {name: second["options"][name] for name in ("granularity", "statistic", "time_limit")} == {
        "granularity": "block",
        "statistic": "median",
        "time_limit": 60,
    }
    assert [part["state"] for part in second["parts"]] == ["queued", "queued"]
    assert "cancelled" in blueprints("cancel", second["id"]).stdout
    watched = blueprints("watch", second["id"], code=1).stdout
    assert "is cancelled" in watched
    assert "(2 cancelled)" in watched
    assert [row["id"] for row in json.loads(blueprints("jobs", "--state", "cancelled", "--json").stdout)] == [
        second["id"]
    ]
    assert job["id"] in blueprints("jobs").stdout


def test_a_failed_job_says_why(blueprints: Run, server: Server) -> None:
    job = json.loads(blueprints("submit", "tiny", "0.8", "--source", "/d", "--data", "a=/a.txt", "--json").stdout)
    with Client(server.url, api_key=server.key("worker", Scope.WORK), cache=False) as worker:
        token = worker.claim_job(job["id"]).lease_token
        worker.end_job(job["id"], JobOutcome(lease_token=token, state="failed", reason="no config.json in /d"))
    assert "is failed: no config.json in /d" in blueprints("watch", job["id"], code=1).stdout


def test_errors_go_to_stderr_and_tell_what_to_do(blueprints: Run, tmp_path: Path) -> None:
    assert "no" in blueprints("fetch", "nothing", "0.8", code=1).stderr.lower()
    assert blueprints("watch", "nope", code=1).stdout == ""
    assert "BLUEPRINTS_API_KEY" in blueprints("jobs", code=1, BLUEPRINTS_API_KEY="").stderr
    assert "BLUEPRINTS_OFFLINE" in blueprints("list", code=1, BLUEPRINTS_OFFLINE="1").stderr
    away = blueprints("--timeout", "0.5", "--url", "http://127.0.0.1:9", "list", code=1)
    assert "No answer from http://127.0.0.1:9" in away.stderr
    (tmp_path / "bad.json").write_text('{"model_id": "tiny", "training_checkpoint": 2, "layers": []}')
    assert "/training_checkpoint" in blueprints("publish", "bad.json", code=1).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("fetch", "tiny"),
        ("fetch", "tiny", "seven"),
        ("publish", "no-such-file.json"),
        ("submit", "tiny", "0.8", "--source", "/d", "--data", "no-equals-sign"),
        ("submit", "tiny", "0.8", "--source", "/d", "--data", "general=/a", "--data", "general=/b"),
        ("jobs", "--state", "sleeping"),
        ("versions", "tiny", "--lab", "nobody"),
        ("aggregate", "tiny", "--version", "1", "--all"),
        ("fetch", "tiny", "0.8", "--json", "--csv"),
        ("--url", "ftp://registry", "list"),
        ("--url", "http://registry:8000x", "list"),
    ],
)
def test_a_wrong_call_exits_2(blueprints: Run, arguments: tuple[str, ...]) -> None:
    done = blueprints(*arguments, code=2)
    assert done.stderr


def test_runs_do_not_offer_any_lab(blueprints: Run) -> None:
    assert "only of this lab" in blueprints("runs", "--help").stdout  # the registry takes no * there
    assert "* for any" in blueprints("versions", "--help").stdout


def test_every_command_speaks_json_and_explains_itself() -> None:
    commands = [*app.registered_commands, *alias_app.registered_commands]
    assert len(commands) >= 17
    for command in commands:
        assert command.callback is not None
        assert "as_json" in command.callback.__annotations__, command.callback.__name__
        assert command.callback.__doc__, command.callback.__name__
