"""A rehearsal of a year: `python -m deploy.rehearsal --previous REF` plays what may happen to a composed registry.

It brings up the release REF, publishes, upgrades it to this working tree, plays the demo with two APIs and two workers,
kills every kind of container while clients go on, backs up, destroys, restores and verifies. Everything happens in a
project and a folder of its own, which are removed at the end. It needs Docker, compose (`--compose`: how to call it)
and root on Linux, to kill as a crash does: what `docker kill` ends is not started again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from deploy.clients import Clients, make_small_checkpoint
from deploy.stack import REPOSITORY, Stack, check_out, say
from gradient_blueprints import Client, Job, JobState

PROJECT = "blueprints-rehearsal"
JOB_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearsal", description=__doc__)
    parser.add_argument("--previous", default="HEAD", help="the release to upgrade from (default: %(default)s)")
    parser.add_argument("--compose", default="docker compose", help="how compose is called (default: %(default)s)")
    parser.add_argument("--port", type=int, default=18_000, help="port to publish (default: %(default)s)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        check_out(arguments.previous, folder / "previous")
        check_out(None, folder / "current")
        environment = {"BLUEPRINTS_PORT": str(arguments.port), "COMPOSE_PROJECT_NAME": PROJECT}
        previous, current = (
            Stack(folder / release, shlex.split(arguments.compose), environment) for release in ("previous", "current")
        )
        current.run("make", "--no-print-directory", "secrets")
        for shared in ("secrets", "sources"):
            (folder / "previous" / shared).symlink_to(folder / "current" / shared)
        try:
            _rehearse(previous, current, folder)
        finally:
            current.compose("--profile", "gpu", "down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
    say("done: everything that was started is gone")
    return 0


def _rehearse(previous: Stack, current: Stack, folder: Path) -> None:
    say("the previous release comes up from nothing")
    previous.compose("up", "-d", "--build", "api", "relay")
    url, admin_key = current.wait_until_ready()
    with Client(url, api_key=admin_key, cache=False) as admin:
        admin.create_lab("lab")
        key = admin.create_key("lab", ["read", "publish", "profile"]).secret
    clients = Clients(url, key)
    clients.publish_some(20)
    make_small_checkpoint(current.folder / "sources" / "small")
    waiting = _submit(url, key, "waiting")

    say("it is upgraded in place to two APIs and two workers")
    started = time.monotonic()
    current.compose("up", "-d", "--build", "--remove-orphans", "--scale", "api=2", "--scale", "worker=2")
    current.wait_until_ready()
    say(f"ready after {time.monotonic() - started:.0f} s, images included")
    current.wait_until_healthy({"api": 2, "worker": 2, "relay": 1, "gateway": 1, "postgres": 1, "redis": 1})
    before = clients.check()
    with Client(url, api_key=key, cache=False) as lab:
        _expect_success(lab, waiting)
    say(f"{before} documents of the previous release are the same to the byte; the job that waited is done")

    say("the demo")
    demo = [sys.executable, "-m", "demo", "--short", "--url", url, "--work", str(folder / "work")]
    demo += ["--report", str(folder / "report.html")]
    subprocess.run(demo, cwd=REPOSITORY, env=os.environ | {"BLUEPRINTS_API_KEY": admin_key}, check=True)

    say("containers are killed while clients publish and fetch")
    clients.start()
    try:
        for service in ("api", "relay", "worker", "redis", "postgres", "gateway"):
            _kill_amid_a_job(current, service, url, key)
            clients.raise_failure()
    finally:
        done = clients.stop()
    say(done)
    clients.check()
    say("every acknowledged document is there, and the version numbers have no gap")

    say("backup, destruction, restoration")
    backup = folder / "backup"
    current.run("deploy/backup.sh", str(backup))
    current.run("deploy/backup.sh", str(backup))  # on top of the first
    current.compose("down", "--volumes")
    current.run("deploy/restore.sh", str(backup))
    current.compose("up", "-d")
    current.wait_until_ready()
    clients.check()
    say("what was restored is the same to the byte, and the old keys are valid")
    verified = current.compose("exec", "-T", "api", "python", "-m", "app", "verify", check=False)
    assert verified == 0, "verify found a fault in what was restored"
    current.flip_a_byte()
    assert current.compose("exec", "-T", "api", "python", "-m", "app", "verify", check=False) == 1
    say("verify found the byte that was flipped in the store")


def _kill_amid_a_job(stack: Stack, service: str, url: str, key: str) -> None:
    """While a job runs a container of the service is killed, or every worker; the job still ends with a blueprint."""
    with Client(url, api_key=key, cache=False, timeout=10) as lab:
        job = _submit(url, key, f"killed-{service}-{time.time_ns()}", batches=60)
        _wait(lab, job, JobState.RUNNING)
        started = time.monotonic()
        stack.kill(service, every=service == "worker")
        stack.wait_until_healthy(stack.expected)
        healthy = time.monotonic() - started
        _expect_success(lab, job)
        say(f"{service} killed: all healthy again after {healthy:.0f} s, its job done")


def _submit(url: str, key: str, model_id: str, batches: int = 2) -> Job:
    """As every release understands it: the SDK of today sends fields that the previous one may not know."""
    sources = "/data/sources/small"
    request = {
        "model_id": model_id,
        "training_checkpoint": 1.0,
        "source": f"{sources}/checkpoint",
        "data": {"general": {"source": f"{sources}/general.txt"}},
        "options": {"batches": batches, "batch_size": 2, "sequence_length": 32},
    }
    authorization = {"Authorization": f"Bearer {key}"}
    answer = httpx2.post(f"{url}/v1/jobs", json=request, headers=authorization, timeout=30, trust_env=False)
    return Job.model_validate(answer.raise_for_status().json())


def _wait(lab: Client, job: Job, state: JobState) -> None:
    deadline = time.monotonic() + JOB_SECONDS
    while (now := lab.get_job(job.id)).state is not state:
        assert not now.state.terminal, f"the job of {job.model_id} ended {now.state}: {now.reason}"
        assert time.monotonic() < deadline, f"the job of {job.model_id} is still {now.state}"
        time.sleep(0.2)


def _expect_success(lab: Client, job: Job) -> None:
    _wait(lab, job, JobState.SUCCEEDED)
    versions = list(lab.list_versions(job.model_id, 1.0))
    assert len(versions) == 1, f"the job of {job.model_id} published {len(versions)} versions"


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
