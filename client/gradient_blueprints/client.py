"""`Client` and `AsyncClient`: the same methods, and each its own way of sending."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from gradient_blueprints.calls import DEFAULT_TIMEOUT
from gradient_blueprints.file_methods import FileMethods
from gradient_blueprints.job_methods import JobMethods
from gradient_blueprints.methods import RegistryMethods
from gradient_blueprints.run_methods import RunMethods
from gradient_blueprints.selection_methods import SelectionMethods
from gradient_blueprints.statistics_methods import StatisticsMethods
from gradient_blueprints.transport import Awaiting, Blocking
from gradient_blueprints.webhook_methods import WebhookMethods


class Methods(
    RegistryMethods, FileMethods, JobMethods, StatisticsMethods, SelectionMethods, RunMethods, WebhookMethods
):
    """Everything that a client can be asked, however it sends."""


class Client(Methods, Blocking):
    """A registry, for blocking code. Threads may share one; a forked process may go on with its copy.

    What is not given comes from BLUEPRINTS_URL, BLUEPRINTS_API_KEY, BLUEPRINTS_CACHE (a folder)
    and BLUEPRINTS_OFFLINE. `cache=False` keeps nothing. `timeout` is in seconds: the longest that
    one call may take with all its retries, and for files the longest time without progress.

    >>> client = Client("http://127.0.0.1:8000")
    >>> client
    <Client http://127.0.0.1:8000, without a key>
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        cache: str | Path | bool | None = None,
        offline: bool | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self._configure(url, api_key, cache, offline, timeout)
        Blocking.__init__(self, self._origin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(Methods, Awaiting):
    """A registry, for asyncio. The methods and arguments of `Client`; listings are asynchronous iterators.

    async with AsyncClient() as client:
        blueprint = await client.fetch_blueprint("foundation-7b", 0.8)
        models = [model async for model in client.list_models()]

    Belongs to the event loop that it was first used on.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        cache: str | Path | bool | None = None,
        offline: bool | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self._configure(url, api_key, cache, offline, timeout)
        Awaiting.__init__(self, self._origin)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
