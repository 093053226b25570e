"""Checkpoints and texts in buckets, `s3://bucket/prefix`, through the S3 protocol.

Which buckets a job may name is the operator's choice (BLUEPRINTS_ALLOWED_BUCKETS). Credentials, region and endpoint
are boto3's own, from the worker's environment; nothing in a source has a say in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from gradient_blueprints.models import Progress
from worker.sources import SourceRefused, check_sizes, files_of_checkpoint

SCHEME = "s3://"
REFUSALS = {"403", "404", "AccessDenied", "AllAccessDisabled", "NoSuchBucket", "NoSuchKey"}
REDIRECTS = {"301", "302", "303", "307", "308", "PermanentRedirect", "TemporaryRedirect"}


def fetch_folder(
    source: str, folder: Path, *, allowed: Sequence[str], max_bytes: int, report: Callable[[Progress], None]
) -> None:
    """The files of a checkpoint that lie directly under the prefix."""
    bucket, prefix = _split(source, allowed)
    s3 = _client()
    start = f"{prefix}/" if prefix else ""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start, Delimiter="/")
    with _answers(source):
        found = {entry["Key"][len(start) :]: entry["Size"] for page in pages for entry in page.get("Contents", ())}
    wanted = {name: found[name] for name in sorted(files_of_checkpoint(found))}
    if not wanted:
        raise SourceRefused(f"{source!r} holds no checkpoint; give the prefix that a save_pretrained folder lies under")
    check_sizes(wanted, max_model_bytes=max_bytes)
    done, total = 0, sum(wanted.values())
    for name, size in wanted.items():
        report(Progress(phase="fetching", done=done, total=total))
        _download(s3, source, bucket, start + name, folder / name)
        done += size


def fetch_file(source: str, folder: Path, *, allowed: Sequence[str], max_bytes: int) -> Path:
    """One object of at most `max_bytes`."""
    bucket, key = _split(source, allowed)
    name = key.rpartition("/")[2]
    if not re.fullmatch(r"[\w.-]+", name) or name in {".", ".."}:
        raise SourceRefused(f"{source!r} names no file of letters, digits and ._-")
    s3 = _client()
    with _answers(source):
        size = int(s3.head_object(Bucket=bucket, Key=key)["ContentLength"])
    if size > max_bytes:
        raise SourceRefused(f"{source!r} has {size:,} bytes; this worker reads at most {max_bytes:,}")
    _download(s3, source, bucket, key, folder / name)
    return folder / name


def _split(source: str, allowed: Sequence[str]) -> tuple[str, str]:
    """Bucket and prefix of an allowed source."""
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([^\x00-\x1f]*))?", source)
    if match is None:
        raise SourceRefused(f"{source!r} is no s3://bucket/prefix")
    bucket, prefix = match[1], (match[2] or "").strip("/")
    if ".." in prefix.split("/"):
        raise SourceRefused(f"{source!r} has .. in its prefix")
    whole = f"{bucket}/{prefix}/"
    if not any(whole.startswith(f"{entry.strip('/')}/") for entry in allowed):
        listed = ", ".join(allowed) or "none (the operator sets BLUEPRINTS_ALLOWED_BUCKETS)"
        raise SourceRefused(f"{source!r} does not lie in an allowed bucket of this worker: {listed}")
    return bucket, prefix


def settle_operators_part() -> str:
    """Find the credentials, wherever the operator keeps them, and tell the endpoint: before connections are guarded.

    An instance's own are asked for at a metadata address, which no source may lead to.
    """
    client = _client()
    boto3.DEFAULT_SESSION.get_credentials()
    return str(client.meta.endpoint_url)


def _client() -> Any:
    """Of the process's one session, which looks for credentials once."""
    retries = {"mode": "standard", "total_max_attempts": 5}
    return boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))


def _download(s3: Any, source: str, bucket: str, key: str, target: Path) -> None:
    """In parts, several at a time, a part that broke off again by itself; all of the same version (If-Match)."""
    with _answers(source):
        s3.download_file(bucket, key, str(target))


@contextmanager
def _answers(source: str) -> Iterator[None]:
    """A refusal of the bucket is the job's fault; anything else may pass."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in REFUSALS:
            raise SourceRefused(
                f"{source!r} cannot be read ({code}): is the name right, and may this worker read it?"
            ) from error
        if code in REDIRECTS:
            raise _lies_elsewhere(source) from error
        raise
    except RecursionError as error:  # botocore asks who redirected it for the bucket's region, and is redirected
        raise _lies_elsewhere(source) from error


def _lies_elsewhere(source: str) -> SourceRefused:
    return SourceRefused(f"{source!r} is said to lie elsewhere, and this worker does not follow there")
