"""What every method is made of: configuration, paths, pages, and one definition that serves both clients."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import re
import time
import types
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping
from decimal import Decimal
from functools import update_wrapper
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import BaseModel, ValidationError

from gradient_blueprints.cache import Cache, default_folder
from gradient_blueprints.errors import ConfigurationError, ErrorPlace, InvalidDocument, OfflineMiss
from gradient_blueprints.models import MODEL_ID_PATTERN, Page, escaped_in_pointer, format_checkpoint
from gradient_blueprints.transport import Answer, Awaiting, Blocking, Emit, Origin, Request, Steps, Stream, exchange

DEFAULT_TIMEOUT = 60.0
LONGEST_TIMEOUT = 1e6  # seconds, eleven days; of some hundred years a socket makes an OverflowError
PAGE_SIZE = 200
JSON_BODY = {"Content-Type": "application/json"}

P = ParamSpec("P")
T = TypeVar("T")
Built = TypeVar("Built", bound=BaseModel)
AnyPage = TypeVar("AnyPage", bound=Page)
Checkpointish = float | str | Decimal


# --- configuration


class Connected:
    """A registry, a key, a cache, and the patience to use them with."""

    _origin: Origin
    cache: Cache
    offline: bool
    timeout: float

    def _configure(
        self,
        url: str | None,
        api_key: str | None,
        cache: str | Path | bool | None,
        offline: bool | None,
        timeout: float,
    ) -> None:
        environment = os.environ
        self._origin = Origin(
            url=_registry_url(url or environment.get("BLUEPRINTS_URL", "")),
            user_agent=_user_agent(),
            key=_usable_key(api_key or environment.get("BLUEPRINTS_API_KEY", "")),
        )
        if cache is None or cache is True or cache == "":
            folder: Path | None = Path(environment.get("BLUEPRINTS_CACHE") or default_folder(environment)).expanduser()
        else:
            folder = None if cache is False else Path(cache).expanduser()
        self.cache = Cache(folder)
        self.offline = (
            _switch("BLUEPRINTS_OFFLINE", environment.get("BLUEPRINTS_OFFLINE", "")) if offline is None else offline
        )
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ConfigurationError(f"timeout={timeout!r} cannot be used: give seconds above 0.")
        self.timeout = min(float(timeout), LONGEST_TIMEOUT)

    @property
    def url(self) -> str:
        return self._origin.url

    def __repr__(self) -> str:
        key = "with a key" if self._origin.key else "without a key"
        return f"<{type(self).__name__} {self.url}, {key}{', offline' if self.offline else ''}>"

    # --- sending, in steps

    def _exchange(self, request: Request, **how: Any) -> Steps[Answer]:
        if self.offline:
            raise OfflineMiss(
                f"{request} needs the registry {self.url}, and this client is offline. "
                "Unset BLUEPRINTS_OFFLINE, or make the client with offline=False."
            )
        return (yield from exchange(request, self.url, **({"timeout": self.timeout} | how)))

    def _read(self, kind: type[Built], path: str, query: Mapping[str, str] | None = None) -> Steps[Built]:
        answer = yield from self._exchange(Request("GET", path, query or {}))
        return answer.parse(kind)

    def _write(
        self,
        kind: type[Built],
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Steps[Built]:
        """A change without an idempotency key: sent once."""
        content = None if body is None else body.model_dump_json(exclude_none=True).encode()
        sent = dict(headers or {}) | (JSON_BODY if content is not None else {})
        answer = yield from self._exchange(Request(method, path, {}, sent, content, repeatable=False))
        return answer.parse(kind)

    def _pages(
        self, kind: type[AnyPage], member: str, path: str, query: Mapping[str, str], limit: int | None
    ) -> Stream[Any]:
        """Emit the members of every page, `limit` of them at most."""
        left = limit
        size = PAGE_SIZE if limit is None else max(1, min(PAGE_SIZE, limit))
        asked = dict(query) | {"limit": str(size)}
        while left is None or left > 0:
            page = yield from self._read(kind, path, asked)
            items = getattr(page, member)[:left]
            for item in items:
                yield Emit(item)
            left = None if left is None else left - len(items)
            if page.next is None:
                return
            asked = query_of_next(page.next)


def query_of_next(link: str) -> dict[str, str]:
    """Only the query is taken from a page's link to the next, so that no answer decides where the key goes."""
    return dict(parse_qsl(urlsplit(link).query, keep_blank_values=True))


def _registry_url(text: str) -> str:
    if not text.strip():
        raise ConfigurationError(
            "No registry is named: set BLUEPRINTS_URL, or pass url=, for example http://127.0.0.1:8000."
        )
    try:
        parts = urlsplit(text.strip())
        _ = parts.port  # read here, for only reading it finds what is no number
    except ValueError:  # which may show a password
        raise ConfigurationError(
            "The registry's URL has a host or a port that cannot be: give one such as http://127.0.0.1:8000."
        ) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(
            f"{parts.scheme or text!r} is no registry's URL: give one such as https://registry.example.org."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError(
            f"The URL of the registry at {parts.hostname} holds more than scheme, host, port and path; "
            "a key goes to BLUEPRINTS_API_KEY or api_key=."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _usable_key(text: str) -> str | None:
    key = text.strip()
    if not re.fullmatch(r"[!-~]*", key):  # checked here, for an error further down would show it
        raise ConfigurationError("The key holds characters that no key has; copy it again (it starts with gbr_).")
    return key or None


def _switch(name: str, text: str) -> bool:
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"", "0", "false", "no", "off"}:
        return False
    raise ConfigurationError(f"{name}={text!r} is neither yes nor no: set it to 1 or 0.")


def _user_agent() -> str:
    return f"gradient-blueprints/{own_version()} python/{platform.python_version()}"


def own_version() -> str:
    try:
        return version("gradient-blueprints")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


# --- arguments


def built(kind: type[Built], **values: Any) -> Built:
    """The wire type from arguments; ConfigurationError names the argument that does not fit."""
    try:
        return kind(**values)
    except ValidationError as invalid:
        found = invalid.errors(include_url=False, include_context=False, include_input=False)
        # A tuple whose only member is faulty counts as empty too.
        within = {fault["loc"][:end] for fault in found for end in range(len(fault["loc"]))}
        faults = "; ".join(
            ": ".join((*filter(None, [".".join(map(str, fault["loc"]))]), fault["msg"]))
            for fault in [fault for fault in found if fault["loc"] not in within][:5]
        )
        raise ConfigurationError(f"These arguments do not make a {kind.__name__}: {faults}.") from None


def model_path(model_id: str, *rest: str) -> str:
    if not isinstance(model_id, str) or not re.fullmatch(MODEL_ID_PATTERN, model_id):
        raise ConfigurationError(
            f"{model_id!r} is not a model id: give `name` or `org/name` of letters, digits and ._-"
        )
    return "/".join(("/v1/models", model_id, *map(_path_part, rest)))


def checkpoint_path(model_id: str, checkpoint: Checkpointish, *rest: str) -> str:
    return model_path(model_id, "checkpoints", checkpoint_text(checkpoint), *rest)


def checkpoint_text(checkpoint: Checkpointish) -> str:
    try:
        return format_checkpoint(checkpoint)
    except ValueError as error:
        raise ConfigurationError(f"{error}.") from None


def job_path(job_id: str, *rest: str) -> str:
    return "/".join(("/v1/jobs", _path_part(job_id), *rest))


def _path_part(name: str) -> str:
    """A name within a path; dots, which quoting leaves, would lead to another resource."""
    if not isinstance(name, str) or name in {"", ".", ".."}:
        raise ConfigurationError(f"{name!r} is no name of anything in a registry: give that of an alias or a job.")
    return quote(name, safe="")


def version_text(version: int | str) -> str:
    try:
        number = int(version)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or (not isinstance(version, str) and number != version):
        raise ConfigurationError(f"version={version!r} is no version: give a whole number from 1 on.")
    return str(number)


def digest_text(digest: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ConfigurationError(f"{digest!r} is not a digest: give sha256: and 64 hex digits.")
    return digest


def some(**query: object) -> dict[str, str]:
    """The query of those arguments that were given."""
    return {name: str(value) for name, value in query.items() if value is not None}


def json_bytes(document: Any) -> bytes:
    """JSON of plain data; numpy and torch scalars count as the numbers they hold.

    Raises InvalidDocument that points to each NaN and infinity, which JSON has no words for.
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "item"):
            return value.item()
        raise TypeError(f"{type(value).__name__} is not JSON data")

    try:
        text = json.dumps(document, default=plain, ensure_ascii=False)
        content = text.encode()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"The document is not JSON data: {error}.") from None
    if "NaN" in text or "Infinity" in text:  # perhaps within a name
        places = list(_not_finite(json.loads(text), ""))
        if places:
            raise InvalidDocument("The document holds numbers that are not finite.", errors=places[:100])
    return content


def _not_finite(value: Any, pointer: str) -> Iterator[ErrorPlace]:
    if isinstance(value, float) and not math.isfinite(value):
        yield {"pointer": pointer, "code": "finite_number", "detail": f"{value} is not a finite number"}
    elif isinstance(value, dict | list):
        for name, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(member, f"{pointer}/{escaped_in_pointer(name)}")


def new_idempotency_key() -> str:
    return uuid.uuid4().hex


def left_until(deadline: float | None, most: float) -> float:
    """Seconds until the deadline, but at most `most`; 0 when it has passed."""
    return most if deadline is None else max(0.0, min(most, deadline - time.monotonic()))


# --- one definition for both clients


class method(Generic[P, T]):  # noqa: N801 - a decorator
    """Makes steps that end in a result a function of `Client` and a coroutine function of `AsyncClient`."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self.__doc__ = steps.__doc__

        def blocking(client: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return client._run(steps(client, *args, **kwargs))

        async def awaited(client: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return await client._run(steps(client, *args, **kwargs))

        self._blocking = _like(steps, blocking, "{}")
        self._awaited = _like(steps, awaited, "{}")

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: object, owner: type) -> Callable[..., Any]:
        return _bound(self._awaited if issubclass(owner, Awaiting) else self._blocking, client)


class listing(Generic[P, T]):  # noqa: N801 - a decorator
    """Makes steps that emit items an iterator of `Client` and an asynchronous iterator of `AsyncClient`."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Stream[T]]) -> None:
        self.__doc__ = steps.__doc__

        def blocking(client: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
            return client._iterate(steps(client, *args, **kwargs))

        def awaited(client: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
            return client._iterate(steps(client, *args, **kwargs))

        self._blocking = _like(steps, blocking, "Iterator[{}]")
        self._awaited = _like(steps, awaited, "AsyncIterator[{}]")

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, Generator[T, None, None]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, AsyncGenerator[T, None]]: ...
    def __get__(self, client: object, owner: type) -> Callable[..., Any]:
        return _bound(self._awaited if issubclass(owner, Awaiting) else self._blocking, client)


def _like(steps: Callable[..., Any], function: Callable[..., Any], returns: str) -> Callable[..., Any]:
    """The function with the name, the words and the parameters of its steps, for help() and editors."""
    update_wrapper(function, steps)
    signature = inspect.signature(steps)
    result = str(signature.return_annotation).partition("[")[2].removesuffix("]")
    function.__signature__ = signature.replace(return_annotation=returns.format(result))  # type: ignore[attr-defined]
    return function


def _bound(function: Callable[..., Any], client: object) -> Callable[..., Any]:
    return function if client is None else types.MethodType(function, client)
