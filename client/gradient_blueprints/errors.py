"""Every error of the registry: raised by the server, rendered as problem+json, raised again by the SDK.

BlueprintsError
├── ApiError                          has status, code, detail, request_id, errors
│   ├── MalformedRequest        400   the bytes cannot be read (JSON, CSV, header)
│   ├── Unauthenticated         401   no key, or one that is unknown, expired or revoked
│   ├── PermissionDenied        403   the key lacks a scope, or another lab owns the thing
│   ├── NotFound                404
│   │   ├── ModelNotFound, CheckpointNotFound, BlueprintNotFound, AliasNotFound
│   │   ├── BlobNotFound, CheckpointFileNotFound, JobNotFound, RunNotFound, LabNotFound, KeyNotFound
│   │   └── WebhookNotFound
│   ├── NotAcceptable           406
│   ├── Conflict                409
│   │   ├── IdempotencyConflict, AlreadyExists, UploadConflict, LeaseLost, JobFinished
│   │   └── RunConflict, RunFinished
│   ├── PreconditionFailed      412   If-Match names another revision
│   ├── PayloadTooLarge         413
│   ├── UnsupportedMediaType    415
│   ├── InvalidRequest          422   errors[] points to the places
│   │   └── InvalidDocument, MissingBlob, DigestMismatch
│   ├── RateLimited             429
│   ├── InternalError           500
│   └── ServiceUnavailable      503
├── ConnectionFailed                  no answer within the deadline
├── OfflineMiss                       BLUEPRINTS_OFFLINE=1 and not in the cache
├── UnexpectedAnswer                  an answer that no registry gives (a proxy's page, say)
├── ConfigurationError                an argument or environment variable that cannot be used
└── MissingExtra                      a part of the SDK whose extra is not installed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NotRequired, TypedDict

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ErrorPlace(TypedDict):
    """One entry of `errors[]`: where in the request, by JSON pointer, and what is wrong there."""

    pointer: str
    code: str
    detail: str


class Problem(TypedDict):
    """The body of every error answer (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: NotRequired[str]
    errors: NotRequired[list[ErrorPlace]]


class BlueprintsError(Exception):
    """Anything that this package raises on purpose."""


class ApiError(BlueprintsError):
    """An answer of the registry that is not a success.

    `detail` says what happened and what to do next; `errors` points to the places of a bad
    document; `request_id` finds the request in the server's log.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Error"

    def __init__(
        self,
        detail: str,
        *,
        errors: Sequence[ErrorPlace] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.request_id = request_id
        self.retry_after = retry_after  # seconds
        self.headers = dict(headers or {})
        self.extensions = extensions

    def __str__(self) -> str:
        places = "".join(f"\n  {place['pointer'] or '/'}: {place['detail']}" for place in self.errors)
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.detail}{request}{places}"

    def problem(self) -> dict[str, Any]:
        """The problem+json body; `extensions` become further members."""
        body: dict[str, Any] = {
            "type": f"urn:gradient-blueprints:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        if self.request_id:
            body["request_id"] = self.request_id
        if self.errors:
            body["errors"] = list(self.errors)
        return body | self.extensions


class MalformedRequest(ApiError):
    status, code, title = 400, "malformed_request", "The request cannot be read"


class Unauthenticated(ApiError):
    status, code, title = 401, "unauthenticated", "A valid key is needed"


class PermissionDenied(ApiError):
    status, code, title = 403, "permission_denied", "The key does not allow this"


class NotFound(ApiError):
    status, code, title = 404, "not_found", "Not found"


class ModelNotFound(NotFound):
    code, title = "model_not_found", "No such model"


class CheckpointNotFound(NotFound):
    code, title = "checkpoint_not_found", "No such checkpoint"


class BlueprintNotFound(NotFound):
    code, title = "blueprint_not_found", "No such blueprint"


class AliasNotFound(NotFound):
    code, title = "alias_not_found", "No such alias"


class BlobNotFound(NotFound):
    code, title = "blob_not_found", "No such blob"


class CheckpointFileNotFound(NotFound):
    code, title = "checkpoint_file_not_found", "No such checkpoint file"


class JobNotFound(NotFound):
    code, title = "job_not_found", "No such job"


class RunNotFound(NotFound):
    code, title = "run_not_found", "No such run"


class LabNotFound(NotFound):
    code, title = "lab_not_found", "No such lab"


class KeyNotFound(NotFound):
    code, title = "key_not_found", "No such key"


class WebhookNotFound(NotFound):
    code, title = "webhook_not_found", "No such webhook"


class MethodNotAllowed(ApiError):
    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(ApiError):
    status, code, title = 406, "not_acceptable", "No such representation"


class RequestTimeout(ApiError):
    status, code, title = 408, "request_timeout", "The request took too long to arrive"


class Conflict(ApiError):
    status, code, title = 409, "conflict", "Conflict"


class IdempotencyConflict(Conflict):
    code, title = "idempotency_conflict", "The idempotency key was used for another request"


class AlreadyExists(Conflict):
    code, title = "already_exists", "Already exists"


class UploadConflict(Conflict):
    """The stored part of a file is not where the request goes on; `extensions["received"]` tells how long it is."""

    code, title = "upload_conflict", "The upload does not go on from there"


class LeaseLost(Conflict):
    code, title = "lease_lost", "The job's lease belongs to another worker"


class JobFinished(Conflict):
    code, title = "job_finished", "The job has already ended"


class RunConflict(Conflict):
    """The points do not go on where the run stands; `extensions["points"]` tells how many it has."""

    code, title = "run_conflict", "The run does not go on from there"


class RunFinished(Conflict):
    code, title = "run_finished", "The run has ended"


class PreconditionFailed(ApiError):
    status, code, title = 412, "precondition_failed", "The resource has changed"


class PayloadTooLarge(ApiError):
    status, code, title = 413, "payload_too_large", "The body is too large"


class UnsupportedMediaType(ApiError):
    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class RangeNotSatisfiable(ApiError):
    status, code, title = 416, "range_not_satisfiable", "The range lies outside the blob"


class InvalidRequest(ApiError):
    status, code, title = 422, "invalid_request", "The request is not valid"


class InvalidDocument(InvalidRequest):
    code, title = "invalid_document", "The blueprint is not valid"


class MissingBlob(InvalidRequest):
    code, title = "missing_blob", "The blueprint names a blob that is not in the registry"


class DigestMismatch(InvalidRequest):
    code, title = "digest_mismatch", "The bytes do not have the stated digest"


class RateLimited(ApiError):
    status, code, title = 429, "rate_limited", "Too many requests"


class InternalError(ApiError):
    status, code, title = 500, "internal_error", "The server failed"


class ServiceUnavailable(ApiError):
    status, code, title = 503, "service_unavailable", "The server cannot answer now"


class ConnectionFailed(BlueprintsError):
    """The registry gave no answer before the deadline."""


class OfflineMiss(BlueprintsError):
    """BLUEPRINTS_OFFLINE is set and the cache does not hold what was asked for."""


class UnexpectedAnswer(BlueprintsError):
    """An answer that no registry gives; `status` is its status, where that tells anything."""

    def __init__(self, detail: str, *, status: int | None = None) -> None:
        super().__init__(detail)
        self.status = status


class ConfigurationError(BlueprintsError):
    """An argument or environment variable cannot be used."""


class MissingExtra(BlueprintsError, ImportError):
    """A part of the SDK whose optional dependencies are not installed."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra [{extra}]: pip install 'gradient-blueprints[{extra}]'")


def _subclasses(root: type[ApiError]) -> list[type[ApiError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _subclasses(child))]


ERRORS_BY_CODE: dict[str, type[ApiError]] = {error.code: error for error in _subclasses(ApiError)}
ERRORS_BY_STATUS: dict[int, type[ApiError]] = {
    error.status: error for error in reversed(_subclasses(ApiError)) if error is not ApiError
}


def error_from_problem(
    status: int,
    problem: Mapping[str, Any],
    *,
    retry_after: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """The error that a problem+json body stands for.

    A code that this version does not know falls back to the class of its status, so that an
    older SDK still catches what a newer server raises.
    """
    kind = ERRORS_BY_CODE.get(str(problem.get("code"))) or ERRORS_BY_STATUS.get(status)
    if kind is None:
        kind = InternalError if status >= 500 else MalformedRequest
    known = {"type", "title", "status", "code", "detail", "request_id", "errors"}
    return kind(
        str(problem.get("detail") or kind.title),
        errors=problem.get("errors") or (),
        request_id=problem.get("request_id"),
        retry_after=retry_after,
        headers=headers,
        **{str(key): value for key, value in problem.items() if key not in known},
    )
