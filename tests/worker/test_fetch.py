"""Sources that lie elsewhere: the registry's own store, a real S3 server, the hub that is there and that is not."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import httpx2
import pytest

from gradient_blueprints import Client, LabNotFound, Scope
from gradient_blueprints.cache import RECENT
from gradient_blueprints.models import NewJob, Progress
from tests.api.test_files import put
from tests.conftest import Server
from tests.object_storage import ObjectStorage
from tests.worker.hub import COMMIT, serving_hub
from worker.child import Child, Fetched, Fetching, Specification
from worker.fetch import fetch
from worker.profile import profile
from worker.sources import SourceRefused, read_store_source, resolve_checkpoint
from worker.speaking import FAILED, FINISHED

Specify = Callable[..., Fetching]
LIMIT = 1 << 30


@pytest.fixture
def specify(tmp_path: Path) -> Specify:
    """A job that names `source`, and texts by domain."""

    def make(source: str, data: dict[str, str] | None = None, **changes: Any) -> Fetching:
        folder = tmp_path / f"job-{time.monotonic_ns()}"
        folder.mkdir()
        job = {
            "model_id": "org/tiny",
            "training_checkpoint": 0.8,
            "source": source,
            "data": {name: {"source": text} for name, text in (data or {"general": "/nowhere.txt"}).items()},
            "options": {"batches": 1, "batch_size": 2, "sequence_length": 16},
        }
        known: dict[str, Any] = {
            "job": NewJob.model_validate(job),
            "job_id": "00000000-0000-7000-8000-000000000000",
            "lab": "lab-a",
            "folder": folder,
            "url": "http://127.0.0.1:9",
            "api_key": "none",
            "cache": tmp_path / "cache",
            "cache_bytes": LIMIT,
            "allowed_buckets": (),
            "allowed_hub": (),
            "hub_token": None,
            "max_model_bytes": LIMIT,
            "max_text_bytes": LIMIT,
        }
        return Fetching(**(known | changes))

    return make


def ignore(_: Progress) -> None:
    """Nobody watches."""


def profiled(fetching: Fetching, fetched: Fetched) -> Any:
    """The blueprint of what was fetched, made by the code of the other process."""
    limits = {"max_model_bytes": LIMIT, "max_text_bytes": LIMIT, "device": "cpu", "allowed_roots": ()}
    return profile(Specification(job=fetching.job, folder=fetching.folder, fetched=fetched, **limits), ignore)


# --- the registry's own store


@pytest.fixture
def lab(make_client: Callable[..., Client]) -> Client:
    return make_client("lab-a", Scope.PROFILE)


@pytest.fixture
def stored(specify: Specify, server: Server, lab: Client, roots: Path) -> Specify:
    """Likewise, with the tiny checkpoint and a text uploaded to a registry."""
    lab.upload_checkpoint(roots / "tiny", "org/tiny", 0.8)
    lab.upload_checkpoint_file(roots / "code.jsonl", "org/tiny", 0.8, "texts/code.jsonl")
    key = server.key("workers", Scope.WORK)

    def make(source: str, data: dict[str, str] | None = None, **changes: Any) -> Fetching:
        return specify(source, data, **({"url": server.url, "api_key": key} | changes))

    return make


def test_an_uploaded_checkpoint_is_fetched_once_and_profiled(
    stored: Specify, server: Server, roots: Path, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    fetching = stored("store", {"code": "store:texts/code.jsonl"})
    blueprint = profiled(fetching, fetch(fetching, reports.append))
    checkpoint = resolve_checkpoint(str(roots / "tiny"), [roots], max_model_bytes=LIMIT)
    assert blueprint.provenance.weights_digest == checkpoint.digest()
    assert blueprint.provenance.data["code"]["source"] == "code.jsonl"
    assert {report.phase for report in reports} == {"fetching"}

    files = server.settings.store / "checkpoints" / "files"
    shutil.rmtree(files)  # what is fetched now comes from the worker's own disk
    again = stored("store:org/tiny@0.8", {"code": "store:org/tiny@0.8/texts/code.jsonl"})
    fetched = fetch(again, ignore)
    shutil.rmtree(tmp_path / "cache")  # and what a job has stays while it runs
    assert profiled(again, fetched).digest == blueprint.digest


def test_a_damaged_cached_file_is_fetched_again(stored: Specify, tmp_path: Path) -> None:
    fetch(stored("store"), ignore)
    weights = max((tmp_path / "cache" / "files" / "contents").rglob("*"), key=lambda path: path.stat().st_size)
    weights.unlink()  # not in place: the first job's link is the same file
    weights.write_bytes(b"damaged")
    fetching = stored("store")
    folder = fetch(fetching, ignore).paths["store"]
    assert resolve_checkpoint(str(folder), [fetching.folder, tmp_path / "cache"], max_model_bytes=LIMIT).weight_bytes


def test_another_lab_gets_nothing_of_it(stored: Specify, server: Server) -> None:
    server.key("lab-b")
    with pytest.raises(
        SourceRefused, match=r"lab lab-b has uploaded no checkpoint org/tiny at 0\.8: client\.upload_check"
    ):
        fetch(stored("store", lab="lab-b"), ignore)
    with pytest.raises(LabNotFound):
        fetch(stored("store", lab="lab-b", api_key=server.key("lab-c", Scope.PROFILE)), ignore)


def test_what_is_missing_unfinished_or_too_large_is_refused_with_its_remedy(
    stored: Specify, server: Server, lab: Client, roots: Path
) -> None:
    with pytest.raises(SourceRefused, match=r"no checkpoint org/tiny at 0\.5"):
        fetch(stored("store:org/tiny@0.5"), ignore)
    with pytest.raises(SourceRefused, match=r"uploaded no 'law\.txt' .* there are: texts/code\.jsonl"):
        fetch(stored("store", {"law": "store:law.txt"}), ignore)
    with pytest.raises(SourceRefused, match="at most 100"):
        fetch(stored("store", max_model_bytes=100), ignore)
    with pytest.raises(SourceRefused, match="reads at most 100"):
        fetch(stored("store", {"code": "store:texts/code.jsonl"}, max_text_bytes=100), ignore)
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key('lab-a')}"}) as http:
        put(http, b"half", path="/v1/models/org/tiny/checkpoints/0.8/files/vocab.txt")
    with pytest.raises(SourceRefused, match=r"vocab\.txt is not complete \(4 of .* upload_checkpoint again"):
        fetch(stored("store"), ignore)


@pytest.mark.parametrize(
    ("source", "checkpoint"),
    [
        ("store:../../etc/passwd", False),
        ("store:/etc/passwd", False),
        ("store:", False),
        ("store:a@7/b.txt", False),
        ("store:org/tiny", True),
        ("store:org/tiny@2", True),
        ("store:x@0.5/../y", True),
    ],
)
def test_a_store_source_that_names_nothing_is_refused(source: str, checkpoint: bool) -> None:
    with pytest.raises(SourceRefused):
        read_store_source(source, checkpoint=checkpoint)


# --- buckets


@pytest.fixture
def bucket(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch, roots: Path) -> Any:
    """An operator's environment, and the tiny checkpoint in the bucket."""
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it keeps the credentials that it found first
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    client = storage.client()
    for path in (roots / "tiny").iterdir():
        client.upload_file(str(path), "checkpoints", f"models/tiny/{path.name}")
    client.upload_file(str(roots / "code.jsonl"), "checkpoints", "texts/code.jsonl")
    client.put_object(Bucket="checkpoints", Key="models/tiny/modeling_evil.py", Body=b"evil")
    client.put_object(Bucket="checkpoints", Key="models/tiny/deeper/model.safetensors", Body=b"elsewhere")
    return client


def test_a_checkpoint_and_a_text_in_a_bucket_are_fetched_and_profiled(
    bucket: Any, specify: Specify, roots: Path
) -> None:
    fetching = specify(
        "s3://checkpoints/models/tiny/", {"code": "s3://checkpoints/texts/code.jsonl"}, allowed_buckets=("checkpoints",)
    )
    fetched = fetch(fetching, ignore)
    folder = fetched.paths["s3://checkpoints/models/tiny/"]
    assert not (folder / "modeling_evil.py").exists()
    blueprint = profiled(fetching, fetched)
    checkpoint = resolve_checkpoint(str(roots / "tiny"), [roots], max_model_bytes=LIMIT)
    assert blueprint.provenance.weights_digest == checkpoint.digest()


BAD_BUCKET_SOURCES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("s3://checkpoints/models/tiny", (), "BLUEPRINTS_ALLOWED_BUCKETS"),
    ("s3://checkpoints/models/tiny", ("checkpoints/mod",), "not lie in an allowed bucket"),
    ("s3://checkpoints/models/tiny", ("check",), "not lie in an allowed bucket"),
    ("s3://checkpoints/models/../texts", ("checkpoints/models",), r"has \.\."),
    ("s3://evil.example:9000@checkpoints/x", ("checkpoints",), "is no s3://"),
    ("s3://arn:aws:s3:us-east-1:1:accesspoint/x", ("arn:aws:s3:us-east-1:1:accesspoint",), "is no s3://"),
    ("s3://checkpoints/empty", ("checkpoints",), "holds no checkpoint"),
    ("s3://not-there/models", ("not-there",), "cannot be read"),
    ("s3://checkpoints/models/tiny", ("checkpoints/models",), "at most 100"),
)


def test_a_bucket_source_that_cannot_be_used_is_refused(bucket: Any, specify: Specify) -> None:
    for source, allowed, reason in BAD_BUCKET_SOURCES:
        with pytest.raises(SourceRefused, match=reason):
            fetch(specify(source, allowed_buckets=allowed, max_model_bytes=100), ignore)


def test_a_tokenizer_that_is_too_large_is_not_fetched(
    bucket: Any, specify: Specify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sources.MAX_JSON_BYTES", 1_000)
    fetching = specify("s3://checkpoints/models/tiny", allowed_buckets=("checkpoints",))
    with pytest.raises(SourceRefused, match=r"'tokenizer\.json' has .* reads at most 1,000"):
        fetch(fetching, ignore)
    assert not list(fetching.folder.rglob("*.json"))


def test_a_text_in_a_bucket_is_measured_before_it_is_fetched(bucket: Any, specify: Specify) -> None:
    for name, reason in (("texts/code.jsonl", "reads at most 100"), ("texts/none.jsonl", "cannot be read")):
        fetching = specify(
            "/x", {"a": f"s3://checkpoints/{name}"}, allowed_buckets=("checkpoints",), max_text_bytes=100
        )
        with pytest.raises(SourceRefused, match=reason):
            fetch(fetching, ignore)
        assert not list(fetching.folder.rglob("*.jsonl"))


# --- the hub, in the process that a worker starts


def outcome(specification: Fetching | Specification) -> tuple[str, Any]:
    child = Child(specification)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            ended = child.ended()
            try:
                kind, content = child.said.get(timeout=0.05)
            except Empty:
                if ended:
                    return "died", child.cause_of_death()
                continue
            if kind in {FAILED, FINISHED}:
                return kind, content
        raise AssertionError("the process says nothing")
    finally:
        child.stop()


def test_a_hub_that_cannot_be_reached_is_said_plainly(specify: Specify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    kind, reason = outcome(specify("hf://org/tiny@main", allowed_hub=("org/*",)))
    assert kind == FAILED
    assert reason.startswith("the hub at http://127.0.0.1:9 cannot be reached from this worker (")
    assert "is not in its cache; upload the checkpoint instead" in reason


def test_the_hub_is_fetched_from_at_a_commit_and_its_cache_serves_when_it_is_away(
    specify: Specify, monkeypatch: pytest.MonkeyPatch, roots: Path, tmp_path: Path
) -> None:
    """Against a server of the test's own that speaks the hub's protocol: how the real one differs is not seen here."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    repository = Path(shutil.copytree(roots / "tiny", tmp_path / "repository"))
    (repository / "pytorch_model.bin").write_bytes(b"pickle")
    (repository / "consolidated.safetensors").write_bytes(b"the same weights again")
    (repository / "onnx").mkdir()
    (repository / "onnx" / "below.safetensors").write_bytes(b"not measured, so not to be fetched")
    source = "hf://org/tiny"
    with serving_hub("org/tiny", repository) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        kind, reason = outcome(specify(source, allowed_hub=("org/tiny",), max_model_bytes=100))
        assert (kind, "takes at most 100" in reason) == (FAILED, True)
        kind, reason = outcome(specify("hf://org/tiny@v9", allowed_hub=("*",)))
        assert (kind, reason) == (FAILED, "the hub's repository org/tiny has no revision 'v9'")
        kind, content = outcome(specify(source, allowed_hub=("org/tiny",)))
        assert kind == FINISHED, content
    fetched = Fetched.model_validate(content)
    assert fetched.weights_revision == COMMIT
    names = {path.name for path in fetched.paths[source].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "onnx", "consolidated.safetensors"}
    fetching = specify(source, allowed_hub=("org/tiny",))
    kind, content = outcome(fetching)  # nobody listens any more
    assert (kind, content["weights_revision"]) == (FINISHED, COMMIT)
    for what in (f"snapshots/{COMMIT}/model.safetensors", f"trees/{COMMIT}.json"):
        (tmp_path / "cache" / "hub" / "models--org--tiny" / what).unlink()  # as if the fetch had broken off
        kind, reason = outcome(specify(source, allowed_hub=("org/tiny",)))
        assert (kind, "is not in its cache" in reason) == (FAILED, True)
    shutil.rmtree(tmp_path / "cache")  # and what a job has stays while it runs
    resolve_checkpoint(content["paths"][source], [fetching.folder], max_model_bytes=LIMIT)


def test_the_hub_s_cache_lets_go_of_what_was_not_used_lately_and_only_for_what_it_lacks(
    specify: Specify, monkeypatch: pytest.MonkeyPatch, roots: Path, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = tmp_path / "cache" / "hub"

    def fetch_from_hub(name: str, commit: str, cache_bytes: int) -> None:
        with serving_hub(f"org/{name}", roots / "tiny", commit) as url:
            monkeypatch.setenv("HF_ENDPOINT", url)
            kind, content = outcome(specify(f"hf://org/{name}", allowed_hub=("*",), cache_bytes=cache_bytes))
        assert kind == FINISHED, content

    def cached() -> list[str]:
        return sorted(path.parts[-3].rpartition("--")[2] for path in folder.glob("models--*/snapshots/*"))

    def age() -> None:
        for blob in folder.glob("models--org--old/blobs/*"):
            os.utime(blob, (time.time() - 2 * RECENT,) * 2)

    fetch_from_hub("old", "a" * 40, LIMIT)
    fetch_from_hub("new", "b" * 40, 1)
    assert cached() == ["new", "old"], "another job may be about to take it"
    age()
    fetch_from_hub("new", "b" * 40, sum(path.stat().st_size for path in folder.glob("models--*/blobs/*")))
    assert cached() == ["new", "old"], "nothing was needed"
    fetch_from_hub("new", "b" * 40, 1)
    assert cached() == ["new"]


@pytest.mark.parametrize("allowed", [(), ("other/*",), ("org/tiny-2", "org")])
def test_only_repositories_that_the_operator_allows_are_asked_for(allowed: tuple[str, ...], specify: Specify) -> None:
    with pytest.raises(SourceRefused, match="no repository that this worker may fetch"):
        fetch(specify("hf://org/tiny", allowed_hub=allowed), ignore)


def test_what_is_no_repository_or_no_checkpoint_is_refused(specify: Specify) -> None:
    for source in (
        "hf://tiny",
        "hf://org/tiny/more",
        "hf://org/tiny@",
        "hf://../../etc",
        "hf://org/tiny@../../x",
        "hf://a/b--c",
    ):
        with pytest.raises(SourceRefused, match="is no hf://"):
            fetch(specify(source, allowed_hub=("*",)), ignore)
    with pytest.raises(SourceRefused, match="not from the hub"):
        fetch(specify("/x", {"a": "hf://org/texts"}, allowed_hub=("*",)), ignore)
