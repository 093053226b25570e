"""Quotas of keys and addresses, and that a client who heeds them gets through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from app.api.rate_limits import MOST_CALLERS, WINDOW, Limit, RateLimits
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.models import Scope
from tests.conftest import Server, fresh_database, make_settings, serving

STATE = re.compile(r'"(\w+)";r=(\d+);t=(\d+)')


@pytest.fixture(scope="module")
def settings(postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """One database for all: what is counted is each server's own."""
    with fresh_database(postgres_url, template_database) as url:
        yield make_settings(url, tmp_path_factory.mktemp("limits"))


@contextmanager
def limited(settings: Settings, **changes: int | str) -> Iterator[tuple[Server, httpx2.Client]]:
    with (
        serving(settings.model_copy(update=changes)) as server,
        httpx2.Client(base_url=server.url) as http,
    ):
        yield server, http


def state(answer: httpx2.Response) -> tuple[str, int, int]:
    """Policy, what is left of it, seconds until it is whole again."""
    found = STATE.fullmatch(answer.headers["ratelimit"])
    assert found is not None, answer.headers["ratelimit"]
    return found[1], int(found[2]), int(found[3])


def test_an_address_that_used_up_its_quota_is_refused_and_told_when_to_come_again(settings: Settings) -> None:
    with limited(settings, address_requests_per_minute=3) as (_, http):
        answers = [http.get("/v1/models") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"address";q=3;w=60'}
        assert [state(answer)[:2] for answer in answers] == [("address", left) for left in (2, 1, 0, 0)]
        refused = answers[-1]
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "rate_limited"
        assert refused.json()["request_id"] == refused.headers["x-request-id"]
        assert 0 < int(refused.headers["retry-after"]) <= WINDOW / 3
        assert int(refused.headers["retry-after"]) == state(refused)[2]


def test_probes_are_answered_however_often_they_ask(settings: Settings) -> None:
    with limited(settings, address_requests_per_minute=1) as (_, http):
        assert [http.get(path).status_code for path in ("/livez", "/readyz") * 5] == [200] * 10
        assert "ratelimit" not in http.get("/livez").headers


def test_many_keys_behind_one_address_have_a_quota_each(settings: Settings) -> None:
    with limited(settings, address_requests_per_minute=50, key_requests_per_minute=8) as (server, http):
        keys = [server.key(f"lab-{number}", Scope.READ) for number in range(3)]
        for key in keys:
            headers = {"Authorization": f"Bearer {key}"}
            answers = [http.get("/v1/whoami", headers=headers) for _ in range(10)]
            # the first counts for the address: nobody knew yet that the key is valid
            assert [answer.status_code for answer in answers] == [200] * 9 + [429]
            assert [state(answer)[0] for answer in answers] == ["address"] + ["key"] * 9


def test_guessing_keys_counts_for_the_address(settings: Settings) -> None:
    with limited(settings, address_requests_per_minute=5) as (_, http):
        guesses = [{"Authorization": f"Bearer gbr_{number:043}_000000"} for number in range(6)]
        answers = [http.get("/v1/whoami", headers=headers).status_code for headers in guesses]
        assert answers == [401] * 5 + [429]


def test_a_write_that_was_refused_for_its_quota_is_sent_again(settings: Settings) -> None:
    """Also one that must not be done twice: a refusal is the promise that it was not done."""
    with limited(settings, key_requests_per_minute=60) as (server, http):
        headers = {"Authorization": f"Bearer {server.admin_key}"}
        while http.get("/v1/whoami", headers=headers).status_code == 200:
            pass
        with Client(server.url, api_key=server.admin_key, cache=False) as client:
            assert client.create_lab("lab-z").name == "lab-z"


@pytest.mark.parametrize(
    ("proxies", "forwarded", "statuses"),
    [
        ("", ["1.1.1.1", "2.2.2.2", "3.3.3.3"], [200, 200, 429]),  # nobody is believed
        ("127.0.0.0/8, 10.0.0.0/8", ["1.1.1.1, 10.0.0.7", "2.2.2.2, 10.0.0.7", "3.3.3.3"], [200, 200, 200]),
        ("127.0.0.1", ["9.9.9.9, 1.1.1.1", "8.8.8.8, 1.1.1.1", "7.7.7.7, 1.1.1.1"], [200, 200, 429]),  # made up
        ("127.0.0.1", ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db8::3"], [200, 200, 200, 429]),  # /64
    ],
)
def test_the_address_is_what_trusted_proxies_say(
    settings: Settings, proxies: str, forwarded: list[str], statuses: list[int]
) -> None:
    with limited(settings, address_requests_per_minute=2, trusted_proxies=proxies) as (_, http):
        answers = [http.get("/v1/models", headers={"X-Forwarded-For": given}).status_code for given in forwarded]
        assert answers == statuses


def test_without_limits_nothing_is_counted(settings: Settings) -> None:
    with limited(settings, address_requests_per_minute=0, key_requests_per_minute=0) as (_, http):
        assert "ratelimit" not in http.get("/v1/models").headers


def test_a_quota_comes_back_evenly() -> None:
    limit = Limit("address", 60)  # one a second
    assert [limit.charge("a", 0.0).wait for _ in range(60)] == [0.0] * 60
    assert limit.charge("a", 0.0).wait == pytest.approx(1.0)
    assert limit.charge("a", 0.75).wait == pytest.approx(0.25)
    assert limit.charge("a", 1.0).wait == 0.0
    assert limit.charge("a", 1.0).wait == pytest.approx(1.0)
    assert limit.charge("b", 1.0).wait == 0.0
    assert [limit.charge("a", 1_000.0).wait for _ in range(60)] == [0.0] * 60
    assert limit.charge("a", 1_000.0).wait > 0


def test_who_used_up_a_quota_is_remembered_whoever_else_comes() -> None:
    """More addresses than there is room for push out those who asked least."""
    limit = Limit("address", 2)
    assert [limit.charge("greedy", 0.0).wait > 0 for _ in range(3)] == [False, False, True]
    for number in range(MOST_CALLERS + 10):
        limit.charge(number, 0.001)
    assert len(limit._full_at) <= MOST_CALLERS
    assert limit.charge("greedy", 0.002).wait > 0


def test_as_many_keys_as_there_are_are_remembered_and_no_more(settings: Settings) -> None:
    limits = RateLimits(settings)
    for number in range(MOST_CALLERS + 1):
        limits.recognise(f"Bearer {number}", number)
    assert len(limits._keys) <= MOST_CALLERS
    charge = limits.charge(None, f"Bearer {MOST_CALLERS}".encode())
    assert charge is not None
    assert charge.policy == "key"
