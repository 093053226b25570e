"""Requests built once and answers read once: blocking and async code differ only in the class that performs them.

A method of the client is a generator of *effects*: send this, wait so long, read on. It knows no
socket and no event loop. `Blocking` performs effects with blocking calls, `Awaiting` with awaited
ones, and both send the outcome back into the generator, so that retries, deadlines, caching and
parsing exist once.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, ValidationError

from gradient_blueprints.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    ConfigurationError,
    ConnectionFailed,
    UnexpectedAnswer,
    error_from_problem,
)
from gradient_blueprints.tracing import current_traceparent

if TYPE_CHECKING:
    import httpx2

CONNECT_TIMEOUT = 10.0  # seconds for one connection; the deadline of a call allows several
FIRST_PAUSE = 0.25  # seconds; doubles with each failure, and full jitter takes a random part of it
LONGEST_PAUSE = 8.0
PASSING_STATUSES = frozenset({429, 502, 503, 504})  # 502 and 504: a gateway that cannot reach the registry just now
CHUNK = 1 << 18
EXCERPT = 200  # characters of a foreign answer that its error shows

logger = logging.getLogger("gradient_blueprints")

T = TypeVar("T")
Parsed = TypeVar("Parsed", bound=BaseModel)
AnyHttp = TypeVar("AnyHttp")  # httpx2.Client or httpx2.AsyncClient


# --- what travels


@dataclass(frozen=True, slots=True)
class FilePart:
    """The bytes of a file from `offset` on; `sent` is told of each chunk that goes out, by its size."""

    path: Path
    offset: int = 0
    sent: Callable[[int], None] | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size - self.offset

    def chunks(self) -> Iterator[bytes]:
        """As many bytes as the file had at first; ConfigurationError when it is cut meanwhile."""
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left > 0:
                if not (chunk := file.read(min(CHUNK, left))):
                    raise ConfigurationError(f"{self.path} is cut while it is sent; call again once it is written.")
                left -= len(chunk)
                yield chunk
                if self.sent is not None:
                    self.sent(len(chunk))


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as often as it is sent. `repeatable`: sending it twice does what sending it once does."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Path | FilePart | None = None
    repeatable: bool = True

    @property
    def file(self) -> FilePart | None:
        """The body, where it is sent from a file."""
        if isinstance(self.body, Path):
            return FilePart(self.body)
        return self.body if isinstance(self.body, FilePart) else None

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f"?{urlencode(self.query)}" if self.query else "")


@dataclass(frozen=True, slots=True)
class OpenStream:
    """What is left to read of an answer, and how to read it: known to its performer alone."""

    response: Any
    chunks: Any


@dataclass(slots=True)
class Answer:
    """One answer; `stream` is open while there may be more of it to read."""

    request: Request
    url: str
    status: int
    headers: httpx2.Headers
    content: bytes = b""
    stream: OpenStream | None = None

    def parse(self, kind: type[Parsed]) -> Parsed:
        """The content as that wire type; what a newer registry adds to an answer is passed over."""
        try:
            return kind.model_validate_json(self.content, extra="ignore")
        except ValidationError as invalid:
            raise self.unexpected(f"which is not a {kind.__name__}: {_first_fault(invalid)}") from None

    def unexpected(self, what: str) -> UnexpectedAnswer:
        media_type = self.headers.get("content-type", "no content type")
        text = " ".join(self.content[: 4 * EXCERPT].decode("utf-8", "replace").split())
        excerpt = f" It begins: {text[:EXCERPT]!r}." if text else ""
        return UnexpectedAnswer(
            f"{self.request.method} {self.url} was answered {self.status} ({media_type}), {what}.{excerpt} "
            "Is the URL that of a registry, and nothing between that answers in its place?",
            status=self.status,
        )


def _first_fault(invalid: ValidationError) -> str:
    fault = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the document'}: {fault['msg']}"


# --- effects


@dataclass(frozen=True, slots=True)
class Send:
    """Outcome: an Answer, read to its end unless `stream` and a success. NoAnswer when there is none."""

    request: Request
    deadline: float  # time.monotonic()
    stream: bool = False
    silence: float = 60.0  # seconds without a byte of a stream, or of a body sent from a file


@dataclass(frozen=True, slots=True)
class ReadOn:
    """Outcome: the next bytes of a streamed answer, b"" at its end. NoAnswer when it breaks off."""

    answer: Answer
    seconds: float | None = None  # to wait for them at most, where the stream's silence is longer


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Outcome: what `function` returns; runs in a thread where an event loop must go on."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit(Generic[T]):
    """Hands an item to whoever iterates."""

    item: T


Effect = Send | ReadOn | Pause | Work
Steps = Generator[Effect | Emit[Any], Any, T]
Stream = Generator[Effect | Emit[T], Any, None]


class NoAnswer(Exception):
    """One attempt got no answer, or not all of it."""

    def __init__(self, reason: str, *, hopeless: bool = False) -> None:
        super().__init__(reason)
        self.hopeless = hopeless  # the next attempt would end the same way


# --- retries


def exchange(
    request: Request, url: str, *, timeout: float, stream: bool = False, silence: float = 60.0
) -> Steps[Answer]:
    """Send until there is an answer worth giving, for at most `timeout` seconds.

    Connection failures, 429 and 503 are tried again after a pause with full jitter, at least as
    long as Retry-After asks, as long as the deadline allows it and the request is repeatable; after
    429, which promises that nothing was done, any is.
    Raises the registry's error, ConnectionFailed, or UnexpectedAnswer.
    """
    deadline = time.monotonic() + timeout
    for attempt in count(1):
        began = time.monotonic()
        failure: Exception
        try:
            answer: Answer = yield Send(request, deadline, stream, silence)
        except NoAnswer as no_answer:
            wait, may_pass = 0.0, not no_answer.hopeless and request.repeatable
            failure = ConnectionFailed(_no_answer_text(request, url, no_answer, attempt, timeout))
            failure.__cause__ = no_answer.__cause__
            reason = f"{no_answer}."
        else:
            logger.debug("%s: %d in %.3f s", request, answer.status, time.monotonic() - began)
            if answer.status < 300 or answer.status == 304:
                return answer
            failure = _error(answer)
            reason = f"{answer.status}: {failure.detail if isinstance(failure, ApiError) else failure}"
            wait = _retry_after(answer.headers) or 0.0
            may_pass = answer.status == 429 or (answer.status in PASSING_STATUSES and request.repeatable)
        if request.file is not None:
            deadline += time.monotonic() - began  # the time that a large body takes is not time lost
        pause = wait + jitter(attempt)
        if not may_pass or time.monotonic() + pause >= deadline:
            raise failure
        logger.log(
            logging.WARNING if attempt == 1 else logging.DEBUG,
            "%s%s: %s Trying again in %.1f s, for at most %.0f s.",
            url,
            request.path,
            reason,
            pause,
            deadline - time.monotonic(),
        )
        yield Pause(pause)
    raise AssertionError("count() does not end")


def jitter(failures: int) -> float:
    """Seconds to wait after so many failures in a row: anything up to a bound that doubles (full jitter)."""
    return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10)))  # noqa: S311 - no secret


def _no_answer_text(request: Request, url: str, no_answer: NoAnswer, attempts: int, timeout: float) -> str:
    times = "once" if attempts == 1 else f"{attempts} times"
    why = (
        ""
        if request.repeatable
        else " It was not repeated, because it may have been carried out: look before you repeat it."
    )
    return f"No answer from {url} to {request} (tried {times}, for at most {timeout:g} s): {no_answer}.{why}"


def _error(answer: Answer) -> ApiError | UnexpectedAnswer:
    if 300 <= answer.status < 400:
        where = answer.headers.get("location", "nowhere")
        return answer.unexpected(
            f"a redirect to {where}, which is not followed, for the key belongs to the configured URL"
        )
    problem = _problem(answer)
    if problem is None:
        return answer.unexpected("which is no answer of a registry")
    return error_from_problem(answer.status, problem, retry_after=_retry_after(answer.headers))


def _problem(answer: Answer) -> dict[str, Any] | None:
    if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != PROBLEM_MEDIA_TYPE:
        return None
    if answer.request.method == "HEAD":  # whose answer has no body; its status tells the class
        return {}
    with suppress(ValueError):
        problem = json.loads(answer.content)
        if isinstance(problem, dict) and "code" in problem:
            return problem
    return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now, of a header that gives seconds or a date; None when it gives neither."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000": a date in UTC of a sender who does not know its zone
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


# --- server-sent events


@dataclass(frozen=True, slots=True)
class ServerEvent:
    id: str
    event: str
    data: str


class EventParser:
    """Bytes of a `text/event-stream` in, complete events out, wherever the bytes were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            event = self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            event = ServerEvent(self._id, self._event or "message", "\n".join(self._data)) if self._data else None
            self._event, self._data = "", []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                self._id = value
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
        return None


# --- performers


@dataclass(frozen=True)
class Origin:
    """Where requests go, and with which key."""

    url: str  # without a slash at the end
    user_agent: str
    key: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": self.user_agent}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})


def _httpx_arguments(origin: Origin, send: Send) -> dict[str, Any]:
    import httpx2  # what the cache answers is spared the import

    request = send.request
    headers = dict(request.headers)
    if (parent := current_traceparent()) is not None:  # the caller's own trace, or that of a worker
        headers.setdefault("traceparent", parent)
    left = wait = max(0.001, send.deadline - time.monotonic())
    if request.file is not None:
        headers["Content-Length"] = str(request.file.size)
        wait = send.silence
    try:
        url = httpx2.URL(origin.url + request.path)
    except (httpx2.InvalidURL, UnicodeEncodeError) as error:  # a host that no name can be, say
        raise ConfigurationError(f"{origin.url!r} is no registry's URL: {error}.") from None
    return {
        "method": request.method,
        "url": url,
        "params": dict(request.query) or None,
        "headers": headers,
        "timeout": httpx2.Timeout(connect=min(CONNECT_TIMEOUT, left), read=wait, write=wait, pool=left),
    }


def _http_client(kind: Callable[..., AnyHttp], origin: Origin) -> AnyHttp:
    import httpx2

    certificates = _certificates()
    try:
        # Redirects are not followed: the key is for one origin only.
        return kind(headers=origin.headers(), follow_redirects=False, verify=certificates)
    except (ImportError, ValueError, httpx2.InvalidURL):  # which may show the password of a proxy
        raise ConfigurationError(
            "A proxy that the environment names (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) cannot be used: give one such as "
            "http://proxy:3128, or set NO_PROXY='*' to go without. One of socks5:// needs: pip install httpx2[socks]"
        ) from None


@cache
def _certificates() -> ssl.SSLContext:
    """Shared among clients: reading the certificates takes longer than many a call."""
    import httpx2

    return httpx2.create_ssl_context()


def _answer(send: Send, response: httpx2.Response) -> Answer:
    return Answer(send.request, str(response.request.url), response.status_code, response.headers)


def _from_now_on(response: httpx2.Response, seconds: float) -> None:
    """The limit of each further read; httpx takes one for a whole exchange and knows no deadlines.

    What remains open: a head that comes byte by byte is bounded by its size only.
    """
    response.request.extensions["timeout"]["read"] = max(0.001, seconds)


@contextmanager
def _cut_after(seconds: float | None, response: httpx2.Response) -> Iterator[None]:
    """Ends the connection of an answer that is read for longer; httpx keeps the limit that the reading began with."""
    if seconds is None:
        yield
        return
    connection = response.extensions["network_stream"].get_extra_info("socket")
    timer = threading.Timer(seconds, _shut, (connection,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended meanwhile
        # Not the method of a TLS socket, which takes the session from whoever is reading.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _in_time(send: Send) -> None:
    if time.monotonic() > send.deadline and send.request.file is None:
        raise NoAnswer("the answer came too slowly")


def _no_answer(error: Exception) -> NoAnswer:
    import httpx2

    hopeless = isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError)
    cause: BaseException | None = error
    while cause is not None and not hopeless:
        hopeless = isinstance(cause, ssl.SSLCertVerificationError)
        cause = cause.__cause__ or cause.__context__
    no_answer = NoAnswer(str(error) or type(error).__name__, hopeless=hopeless)
    no_answer.__cause__ = error
    return no_answer


async def _chunks_from_thread(part: FilePart) -> AsyncIterator[bytes]:
    import asyncio

    chunks = part.chunks()
    while chunk := await asyncio.to_thread(next, chunks, b""):
        yield chunk


class Course(Generic[T]):
    """A method under way: its steps, how their last effect ended, and the answers they left open."""

    def __init__(self, steps: Generator[Any, Any, T]) -> None:
        self._steps = steps
        self.opened: list[OpenStream] = []
        self.outcome: Any = None
        self.failure: Exception | None = None
        self.result: T

    def advance(self) -> Any:
        """The next effect; None at the end, when `result` is there."""
        outcome, failure = self.outcome, self.failure
        self.outcome = self.failure = None
        try:
            return self._steps.send(outcome) if failure is None else self._steps.throw(failure)
        except StopIteration as stop:
            self.result = stop.value
            return None

    def abandon(self) -> None:
        self._steps.close()


class Blocking:
    """Performs effects with blocking calls; threads may share one."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._http: httpx2.Client | None = None
        self._opening = threading.Lock()
        self._process = os.getpid()

    def _run(self, steps: Steps[T]) -> T:
        items = self._iterate(steps)
        try:
            while True:
                next(items)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _iterate(self, steps: Generator[Any, Any, T]) -> Generator[Any, None, T]:
        course = Course(steps)
        try:
            while (effect := course.advance()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                    continue
                try:
                    course.outcome = self._perform(effect, course.opened)
                except Exception as error:  # it belongs to the steps, which may have a remedy
                    course.failure = error
            return course.result
        finally:
            course.abandon()
            for stream in course.opened:
                stream.response.close()

    def close(self) -> None:
        """Close the connections; `with` does it too."""
        if self._http is not None and self._process == os.getpid():
            self._http.close()
        self._http = None

    def _perform(self, effect: Effect, opened: list[OpenStream]) -> Any:
        match effect:
            case Send():
                return self._send(effect, opened)
            case ReadOn():
                return self._read_on(effect)
            case Pause():
                time.sleep(effect.seconds)
            case Work():
                return effect.function()
        return None

    def _client(self) -> httpx2.Client:
        import httpx2

        with self._opening:  # of threads that call first at once, one opens the connections
            if self._http is None or self._process != os.getpid():  # a forked child must not share its parent's sockets
                self._http = _http_client(httpx2.Client, self._origin)
                self._process = os.getpid()
            return self._http

    def _send(self, send: Send, opened: list[OpenStream]) -> Answer:
        import httpx2

        part, body = send.request.file, send.request.body
        content = part.chunks() if part is not None else body if isinstance(body, bytes) else None
        try:
            request = self._client().build_request(**_httpx_arguments(self._origin, send), content=content)
            response = self._client().send(request, stream=True)
            answer = _answer(send, response)
            if send.stream and response.is_success:
                _from_now_on(response, send.silence)
                answer.stream = OpenStream(response, response.iter_bytes())
                opened.append(answer.stream)
                return answer
            received = bytearray()
            try:
                _from_now_on(response, send.deadline - time.monotonic())
                for chunk in response.iter_bytes():
                    received += chunk
                    _in_time(send)
            finally:
                response.close()
        except httpx2.RequestError as error:
            raise _no_answer(error) from error
        answer.content = bytes(received)
        return answer

    def _read_on(self, reading: ReadOn) -> bytes:
        import httpx2

        stream = reading.answer.stream
        assert stream is not None
        try:
            with _cut_after(reading.seconds, stream.response):
                return next(stream.chunks, b"")
        except httpx2.RequestError as error:
            raise _no_answer(error) from error


class Awaiting:
    """Performs effects on an asyncio event loop; belongs to the loop that it was first used on."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._http: httpx2.AsyncClient | None = None
        self._process = os.getpid()

    async def _run(self, steps: Steps[T]) -> T:
        course = Course(steps)
        async for _ in self._follow(course):
            pass
        return course.result

    async def _iterate(self, steps: Stream[T]) -> AsyncGenerator[T, None]:
        async with aclosing(self._follow(Course(steps))) as items:
            async for item in items:
                yield item

    async def _follow(self, course: Course[Any]) -> AsyncGenerator[Any, None]:
        try:
            while (effect := course.advance()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                    continue
                try:
                    course.outcome = await self._perform(effect, course.opened)
                except Exception as error:  # it belongs to the steps, which may have a remedy
                    course.failure = error
        finally:
            course.abandon()
            for stream in course.opened:
                await stream.response.aclose()

    async def close(self) -> None:
        """Close the connections; `with` does it too."""
        if self._http is not None and self._process == os.getpid():
            await self._http.aclose()
        self._http = None

    async def _perform(self, effect: Effect, opened: list[OpenStream]) -> Any:
        import asyncio  # half as long to import as all of the SDK's base; whoever is here has it

        match effect:
            case Send():
                return await self._send(effect, opened)
            case ReadOn():
                return await self._read_on(effect)
            case Pause():
                await asyncio.sleep(effect.seconds)
            case Work():
                return await asyncio.to_thread(effect.function)
        return None

    def _client(self) -> httpx2.AsyncClient:
        import httpx2

        if self._http is None or self._process != os.getpid():  # a forked child must not share its parent's sockets
            self._http = _http_client(httpx2.AsyncClient, self._origin)
            self._process = os.getpid()
        return self._http

    async def _send(self, send: Send, opened: list[OpenStream]) -> Answer:
        import httpx2

        part, body = send.request.file, send.request.body
        content = _chunks_from_thread(part) if part is not None else body if isinstance(body, bytes) else None
        try:
            request = self._client().build_request(**_httpx_arguments(self._origin, send), content=content)
            response = await self._client().send(request, stream=True)
            answer = _answer(send, response)
            if send.stream and response.is_success:
                _from_now_on(response, send.silence)
                answer.stream = OpenStream(response, response.aiter_bytes())
                opened.append(answer.stream)
                return answer
            received = bytearray()
            try:
                _from_now_on(response, send.deadline - time.monotonic())
                async for chunk in response.aiter_bytes():
                    received += chunk
                    _in_time(send)
            finally:
                await response.aclose()
        except httpx2.RequestError as error:
            raise _no_answer(error) from error
        answer.content = bytes(received)
        return answer

    async def _read_on(self, reading: ReadOn) -> bytes:
        import asyncio

        import httpx2

        stream = reading.answer.stream
        assert stream is not None
        try:
            async with asyncio.timeout(reading.seconds):
                chunk: bytes = await anext(stream.chunks, b"")
        except (httpx2.RequestError, TimeoutError) as error:
            raise _no_answer(error) from error
        return chunk
