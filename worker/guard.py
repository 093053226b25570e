"""Where the process that fetches sources may connect to: public addresses, and what the operator has named.

Python tells an audit hook of every connection with the address that it goes to, after names were resolved and redirects
followed, whichever library opens it. What opens connections outside Python, as the hub's xet does, is switched off.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from gradient_blueprints.addresses import AddressRefused, Network, check_address

logger = logging.getLogger(__name__)

PORTS = {"http": 80, "https": 443}


class ConnectionGuard:
    """`refused` is the first connection that was asked for and not made."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = tuple(networks)
        self._named: set[tuple[str, int]] = set()
        self.refused: AddressRefused | None = None

    def allow(self, url: str) -> None:
        """The host of a URL in the operator's own settings may be private, at this port. A proxy's may lack http://."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or PORTS.get(parts.scheme)
        if parts.hostname and port is not None:
            self._named.add((parts.hostname, port))

    def put_up(self) -> None:
        """For the rest of this process's life: a hook cannot be taken down again."""
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
            host, port = arguments[1][:2]
            try:
                check_address(host, self._networks)
            except AddressRefused as refused:
                if not self._is_named(host, port):
                    self.refused = self.refused or refused
                    raise

    def _is_named(self, address: str, port: int) -> bool:
        """Asked anew each time: the operator's names may move."""
        return any(port == named and address in _addresses(host, port) for host, named in self._named)


def _addresses(host: str, port: int) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        logger.warning("%s is not known: %s", host, error)
        return set()
