"""How many requests a key or an address may send: a quota each, counted in this process.

The algorithm is GCRA (ITU-T I.371): of each caller one number is kept, the time at which its whole quota is there
again. docs/decisions/0013 says why neither a library nor a shared store does this.
"""

from __future__ import annotations

import ipaddress
import math
import time
from functools import lru_cache
from typing import NamedTuple

from app.settings import Settings

WINDOW = 60.0  # seconds in which a quota that was used up is there again
MOST_CALLERS = 100_000  # remembered at once, of each limit
_IPV6_NETWORK = 64  # bits: whoever has one IPv6 address has all of its network

Caller = int | str
RawHeader = tuple[bytes, bytes]


class Charge(NamedTuple):
    """What one request came to. `wait` is above 0 if it is refused: seconds until the next one is not."""

    wait: float
    headers: tuple[RawHeader, RawHeader]
    policy: str


class Limit:
    """`quota` requests at once, and then as many again over each window, evenly."""

    def __init__(self, policy: str, quota: int) -> None:
        self.quota = quota
        self._policy = policy
        self._interval = WINDOW / quota
        self._full_at: dict[Caller, float] = {}
        self._policy_header = (b"ratelimit-policy", f'"{policy}";q={quota};w={WINDOW:.0f}'.encode())

    def charge(self, caller: Caller, now: float) -> Charge:
        before = self._full_at.get(caller, now)
        full_in = max(before - now, 0.0) + self._interval
        wait = full_in - WINDOW
        if wait > 1e-6:
            return Charge(wait, (self._policy_header, self._state(0, wait)), self._policy)
        if len(self._full_at) >= MOST_CALLERS:
            self._forget()
        self._full_at[caller] = now + full_in
        left = int((WINDOW - full_in) / self._interval + 1e-6)
        return Charge(0.0, (self._policy_header, self._state(left, full_in)), self._policy)

    def _state(self, left: int, seconds: float) -> RawHeader:
        return (b"ratelimit", f'"{self._policy}";r={left};t={math.ceil(seconds)}'.encode())

    def _forget(self) -> None:
        """Those who used least of their quota: to forget somebody is to give them all of it."""
        kept = sorted(self._full_at.items(), key=lambda item: item[1])[MOST_CALLERS // 2 :]
        self._full_at = dict(kept)


class RateLimits:
    """A request counts for its key once that is known to be valid, and for its address until then."""

    def __init__(self, settings: Settings) -> None:
        self._by_key = _limit("key", settings.key_requests_per_minute)
        self._by_address = _limit("address", settings.address_requests_per_minute)
        self._keys: dict[int, int] = {}

    def charge(self, client: tuple[str, int] | None, authorization: bytes | None) -> Charge | None:
        """None where nothing is limited."""
        limit = self._by_address
        caller: Caller
        if authorization is not None and (key_id := self._keys.get(hash(authorization))) is not None:
            limit, caller = self._by_key, key_id
        elif limit is not None:
            caller = _network(client[0] if client else "")
        return None if limit is None else limit.charge(caller, time.monotonic())

    def recognise(self, authorization: str, key_id: int) -> None:
        """This header carries that valid key. Its hash is kept, keyed by Python at random for this process."""
        if len(self._keys) >= MOST_CALLERS:
            self._keys.clear()
        self._keys[hash(authorization.encode("latin-1"))] = key_id


def _limit(policy: str, quota: int) -> Limit | None:
    return Limit(policy, quota) if quota else None


@lru_cache(MOST_CALLERS)
def _network(host: str) -> str:
    """Who is meant by an address: itself, or the network of an IPv6 one."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, _IPV6_NETWORK), strict=False)) if not address.scope_id else host
