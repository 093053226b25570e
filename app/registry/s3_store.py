"""Checkpoint files in a bucket, through the S3 protocol: an upload there is a multipart upload, piece for part.

Credentials, region and endpoint are those of boto3's own chain (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …), which only
the operator's environment speaks to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.registry.file_store import MEBIBYTE, READ_BYTES, S3_SCHEME, Progress, StoreFailed, new_place

MOST_PARTS = 10_000  # S3's own limit
MISSING = {"NoSuchUpload", "NoSuchKey", "404"}
FAILURES = (BotoCoreError, Boto3Error, ClientError)


class BucketStore:
    """`PREFIX/files/abcd…` are complete files; what is unfinished lies in multipart uploads, which S3 keeps apart."""

    keeps_rests = False  # a part has at least 5 MiB, but for the last

    def __init__(self, location: str) -> None:
        self._bucket, _, prefix = location.removeprefix(S3_SCHEME).partition("/")
        self._prefix = f"{prefix.strip('/')}/files/".lstrip("/")
        # One client for all threads: boto3 promises that clients, unlike sessions, may be shared.
        retries = {"mode": "standard", "total_max_attempts": 4}
        self._s3: Any = boto3.session.Session().client(
            "s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=32)
        )

    def begin(self) -> tuple[str, Progress]:
        place = new_place()
        try:
            answer = self._s3.create_multipart_upload(**self._object(place))
        except FAILURES as error:
            raise self._failed(error) from error
        return place, {"upload_id": answer["UploadId"]}

    def resume(self, place: str, progress: Progress, received: int, token: int) -> Progress | None:
        if received == 0:
            return progress
        try:
            return progress if sum(part["Size"] for part in self._parts(place, progress)) >= received else None
        except ClientError as error:
            if _code(error) in MISSING:
                return progress if self._size(place) == received else None
            raise self._failed(error) from error
        except BotoCoreError as error:
            raise self._failed(error) from error

    def piece_bytes(self, size: int) -> int:
        return max(8 * MEBIBYTE, -(-size // (MOST_PARTS - 1)))

    def append(self, place: str, progress: Progress, offset: int, token: int, data: bytes, size: int) -> None:
        number = offset // self.piece_bytes(size) + 1
        try:
            self._s3.upload_part(
                **self._object(place), UploadId=progress["upload_id"], PartNumber=number, Body=bytes(data)
            )
        except FAILURES as error:
            raise self._failed(error) from error

    def finish(self, place: str, progress: Progress, size: int, *, hashed: bool) -> str | None:
        """The digest is always that of what can be read back: parts of an overtaken request may be among them."""
        try:
            try:
                found = self._parts(place, progress)
                parts = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in found]
                if parts:
                    self._s3.complete_multipart_upload(
                        **self._object(place), UploadId=progress["upload_id"], MultipartUpload={"Parts": parts}
                    )
                else:  # an empty file, which no multipart upload can make
                    self._s3.put_object(**self._object(place), Body=b"")
                    self._abort(place, progress)
            except ClientError as error:
                if _code(error) not in MISSING:
                    raise
            hasher = hashlib.sha256()
            for chunk in self.read(place, 0, size - 1) if size else ():
                hasher.update(chunk)
        except FAILURES as error:
            raise self._failed(error) from error
        return hasher.hexdigest()

    def discard(self, place: str, progress: Progress) -> None:
        try:
            self._abort(place, progress)
            self._s3.delete_object(**self._object(place))
        except FAILURES as error:
            raise self._failed(error) from error

    def read(self, place: str, first: int, last: int) -> Iterator[bytes]:
        try:
            body = self._s3.get_object(**self._object(place), Range=f"bytes={first}-{last}")["Body"]
            with body:
                yield from body.iter_chunks(READ_BYTES)
        except FAILURES as error:
            raise self._failed(error) from error

    def unfinished(self, older_than: float) -> set[str]:
        return set()  # left to a lifecycle rule of the bucket (AbortIncompleteMultipartUpload)

    def remove_parts(self, place: str) -> None:
        raise AssertionError("unfinished() never names a place")

    def _object(self, place: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + place}

    def _parts(self, place: str, progress: Progress) -> list[dict[str, Any]]:
        pages = self._s3.get_paginator("list_parts").paginate(**self._object(place), UploadId=progress["upload_id"])
        return [part for page in pages for part in page.get("Parts", ())]

    def _size(self, place: str) -> int | None:
        try:
            return int(self._s3.head_object(**self._object(place))["ContentLength"])
        except ClientError as error:
            if _code(error) in MISSING:
                return None
            raise

    def _abort(self, place: str, progress: Progress) -> None:
        try:
            self._s3.abort_multipart_upload(**self._object(place), UploadId=progress["upload_id"])
        except ClientError as error:
            if _code(error) not in MISSING:
                raise

    def _failed(self, error: Exception) -> StoreFailed:
        return StoreFailed(f"{S3_SCHEME}{self._bucket}: {error}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code"))
