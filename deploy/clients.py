"""What clients do during the rehearsal, and what they were promised."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import httpx2

from demo.models import GptSize, pretrain_gpt
from gradient_blueprints import Client
from gradient_blueprints.errors import ConnectionFailed, ServiceUnavailable

MODEL, CHECKPOINT = "rehearsed", 0.8
TEXT = "Where a model learns is where it is worth training.\n\n" * 2_000
SIZE = GptSize(layers=1, width=32, vocabulary=300, steps=2, batch=1, length=32)


def make_small_checkpoint(folder: Path) -> None:
    """A checkpoint that is profiled in seconds and a text, where workers see them."""
    folder.mkdir(parents=True)
    (folder / "general.txt").write_text(TEXT)
    (checkpoint,) = pretrain_gpt("small", TEXT, folder, SIZE, [1.0], lambda step, loss: None)
    checkpoint.folder.rename(folder / "checkpoint")
    for file in (folder / "checkpoint").iterdir():
        file.chmod(0o644)  # safetensors are written for their owner alone, and workers run as somebody else


def document(number: int) -> dict[str, Any]:
    layer = {"id": "attn.0", "gradient_norm": 0.05, "alpha": 1.5, "gamma": 0.4, "k_star": 0.2}
    return {"model_id": MODEL, "training_checkpoint": CHECKPOINT, "layers": [layer], "extra": {"number": number}}


class Clients:
    """One that publishes and one that fetches, for as long as they are not stopped."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._published: list[str] = []  # digests, in the order in which they were acknowledged
        self._fetched = 0
        self._refused = 0
        self._blob = ""
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._publish), threading.Thread(target=self._fetch)]
        self._failures: list[Exception] = []

    def publish_some(self, count: int) -> None:
        """Documents, and an attachment that every later check fetches."""
        with Client(self._url, api_key=self._key, cache=False) as client:
            self._blob = client.upload_blob(TEXT.encode()).digest
            for _ in range(count):
                self._published.append(client.publish_blueprint(document(len(self._published))).digest)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def raise_failure(self) -> None:
        """What a client should never have met."""
        if self._failures:
            raise self._failures[0]

    def stop(self) -> str:
        """What was done."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self.raise_failure()
        return (
            f"{len(self._published)} documents acknowledged, {self._fetched} fetches, "
            f"{self._refused} calls told after all retries that nobody answers"
        )

    def check(self) -> int:
        """Everything that was acknowledged is there, to the byte, under numbers without a gap; how many that are."""
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx2.Client(base_url=self._url, headers=headers, timeout=30, trust_env=False) as http:
            for path, digest in [
                *((f"/v1/blueprints/{digest}", digest) for digest in self._published),
                (f"/v1/blobs/{self._blob}", self._blob),
            ]:
                content = http.get(path).raise_for_status().content
                assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest, f"{path} has other bytes"
        with Client(self._url, api_key=self._key, cache=False) as client:
            numbers = [version.version for version in client.list_versions(MODEL, CHECKPOINT)]
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), "version numbers have a gap"
        assert len(numbers) >= len(self._published)
        return len(self._published)

    def _publish(self) -> None:
        with Client(self._url, api_key=self._key, cache=False) as client:
            number = len(self._published)
            while not self._stopping.wait(0.05):
                try:
                    self._published.append(client.publish_blueprint(document(number)).digest)
                except (ServiceUnavailable, ConnectionFailed):
                    self._refused += 1
                    continue  # with the same document: it may have been stored
                except Exception as error:  # told by raise_failure()
                    self._failures.append(error)
                    return
                number += 1

    def _fetch(self) -> None:
        with Client(self._url, api_key=self._key, cache=False) as client:
            while not self._stopping.wait(0.05):
                digest = self._published[-1]
                try:
                    assert client.fetch_by_digest(digest).digest == digest
                except (ServiceUnavailable, ConnectionFailed):
                    self._refused += 1
                    continue
                except Exception as error:  # told by raise_failure()
                    self._failures.append(error)
                    return
                self._fetched += 1
