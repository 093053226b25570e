"""What the package promises by being installed: its names, its weight, its contents."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import gradient_blueprints
from gradient_blueprints import errors

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "transformers",
    "safetensors",
    "fastapi",
    "starlette",
    "celery",
    "sqlalchemy",
}
CLI_ONLY = {"typer", "rich", "click"}

CLIENT_METHODS = """
aggregate_blueprints alias_history cache cancel_job check_staleness claim_job close compare_blueprints
consensus_blueprints create_key create_lab create_webhook delete_alias delete_checkpoint_file delete_webhook
end_job fetch_blob fetch_blueprint
fetch_by_alias fetch_by_digest fetch_checkpoint_file fetch_factors fetch_shard_state finish_job finish_shard
get_alias get_job get_model get_run heartbeat_job leaderboard list_aliases list_audit list_checkpoint_files
list_checkpoints list_evidence list_jobs list_keys list_labs list_models list_points list_runs list_versions
list_webhook_deliveries list_webhooks
offline publish_blueprint refresh_blueprint report_run revoke_key select_layers send_run set_alias
submit_checkpoint summarize_evidence test_webhook timeout training_courses unyank_version upload_blob upload_checkpoint
upload_checkpoint_file url wait_for_job watch_job whoami yank_version
""".split()  # noqa: SIM905 - a list to read

MODELS = """
Advice Alias AliasMove Attachment AuditEntry BlobSummary Blueprint CheckpointFile CheckpointSummary Claim
Comparison Consensus CostModel Course DataSource Evidence EvidenceSummary HeartbeatAnswer IssuedKey
IssuedWebhook Job
JobEvent JobOutcome JobPart JobState Key Lab Layer LayerChange LayerKind LayerSelection Leaderboard Level
LocalSample ModelSummary Noise ProfileOptions Progress Provenance Publication Run RunHandle Scope
Staleness Statistic TableRow TailFit Verdict VersionSummary Webhook WebhookAttempt WebhookDelivery WebhookEvent
WhoAmI
""".split()  # noqa: SIM905 - a list to read


def loaded_after(code: str, python: str = sys.executable) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    program = f"{code}\nimport sys; print(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    run = subprocess.run([python, "-I", "-c", program], check=True, capture_output=True, text=True, cwd="/")
    return set(run.stdout.split())


def test_the_public_names_are_these() -> None:
    raised = {name for name in dir(errors) if isinstance(getattr(errors, name), type) and not name.startswith("_")}
    own_errors = {name for name in raised if issubclass(getattr(errors, name), errors.BlueprintsError)}
    assert set(gradient_blueprints.__all__) == {"Client", "AsyncClient", *MODELS, *own_errors}
    assert list(gradient_blueprints.__all__) == sorted(gradient_blueprints.__all__)
    for name in gradient_blueprints.__all__:
        assert getattr(gradient_blueprints, name).__name__.rstrip("_") == name
        assert name in dir(gradient_blueprints)
    assert gradient_blueprints.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        gradient_blueprints.no_such_name  # noqa: B018


def test_the_methods_of_a_client_are_these() -> None:
    client = gradient_blueprints.Client("http://127.0.0.1:9", cache=False)
    assert [name for name in dir(client) if not name.startswith("_")] == CLIENT_METHODS


def test_importing_the_package_imports_next_to_nothing() -> None:
    brought = loaded_after("import gradient_blueprints") - loaded_after("import typing, importlib")
    assert brought <= {"gradient_blueprints", "__future__"}


def test_the_client_loads_nothing_heavy_and_no_socket_library_before_it_sends() -> None:
    loaded = loaded_after(
        "from gradient_blueprints import Client, AsyncClient; Client('http://127.0.0.1:9', cache=False)"
    )
    assert not loaded & (HEAVY | CLI_ONLY | {"httpx2", "asyncio"})


def test_sending_loads_nothing_heavy() -> None:
    code = (
        "import gradient_blueprints as g\n"
        "try: g.Client('http://127.0.0.1:9', cache=False, timeout=0.1).whoami()\n"
        "except g.ConnectionFailed: pass"
    )
    loaded = loaded_after(code)
    assert "httpx2" in loaded
    assert not loaded & (HEAVY | CLI_ONLY)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_only_the_sdk(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops - {top for top in tops if top.endswith(".dist-info")} == {"gradient_blueprints"}
    assert "gradient_blueprints/py.typed" in names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True, text=True)
    needs = subprocess.run(
        [
            str(python),
            "-c",
            "from importlib.metadata import requires; print(*requires('gradient-blueprints'), sep='\\n')",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    base = [line for line in needs.stdout.splitlines() if "extra ==" not in line]
    assert sorted(re.split("[<>]", line)[0] for line in base) == ["httpx2", "pydantic"]
    subprocess.run([*pip, *base], check=True, capture_output=True, text=True)

    code = "from gradient_blueprints import *; from gradient_blueprints import Client; Client('http://x', cache=False)"
    assert not loaded_after(code, str(python)) & HEAVY

    command = environment / "bin" / "blueprints"
    run = subprocess.run([str(command), "list"], check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert "pip install 'gradient-blueprints[cli]'" in run.stderr
    assert "Traceback" not in run.stderr


FIRST_USE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from gradient_blueprints.models import Blueprint, Wire
sys.setswitchinterval(1e-6)
together = Barrier(8)
def use(_):
    together.wait()
    layers = [{"id": "a", "gradient_norm": 1.0}]
    return Blueprint.model_validate({"model_id": "m", "training_checkpoint": 0.8, "layers": layers}).digest
with ThreadPoolExecutor(8) as threads:
    assert len(set(threads.map(use, range(8)))) == 1
"""


def test_threads_that_use_a_model_first_do_not_disturb_each_other() -> None:
    """Validators are built at their first use."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=60)
