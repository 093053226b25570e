"""Retries, deadlines and answers that no registry gives, over real sockets that fail."""

from __future__ import annotations

import itertools
import logging
import math
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradient_blueprints import (
    AsyncClient,
    Client,
    ConfigurationError,
    Conflict,
    ConnectionFailed,
    InternalError,
    JobFinished,
    RateLimited,
    ServiceUnavailable,
    UnexpectedAnswer,
    errors,
)
from gradient_blueprints.transport import FIRST_PAUSE, LONGEST_PAUSE, EventParser, jitter
from tests.documents import blueprint_document
from tests.sdk.conftest import Connect
from tests.sdk.faulty_network import FaultyNetwork, answer, drip, hang_up, json_answer, problem

KEY = "gbr_" + "k" * 43 + "_abcdef"
MODEL = '{"model_id": "tiny", "owner": "lab-a", "created_at": "2026-01-01T00:00:00Z", "checkpoints": 1, "versions": 1}'
PUBLICATION = (
    '{"model_id": "tiny", "training_checkpoint": 0.8, "version": 1, "digest": "sha256:' + "0" * 64 + '", '
    '"created": true, "lab": "lab-a"}'
)
UNAVAILABLE = problem(503, "service_unavailable")


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("fault", [UNAVAILABLE, problem(429, "rate_limited"), answer(502, b"bad gateway"), hang_up])
async def test_a_passing_fault_is_tried_again_until_it_has_passed(connect: Connect, fault: bytes) -> None:
    with FaultyNetwork(fault, fault, json_answer(MODEL)) as network:
        assert (await connect(network.url).get_model("tiny")).owner == "lab-a"
        assert network.connections == 3


async def test_a_truncated_answer_is_asked_for_again(connect: Connect) -> None:
    with FaultyNetwork(json_answer(MODEL)[:-10], json_answer(MODEL)) as network:
        assert (await connect(network.url).get_model("tiny")).model_id == "tiny"


@pytest.mark.parametrize(
    ("status", "code", "raised"),
    [(409, "conflict", Conflict), (409, "job_finished", JobFinished), (500, "internal_error", InternalError)],
)
async def test_an_error_that_will_not_pass_is_raised_at_once(
    connect: Connect, status: int, code: str, raised: type[Exception]
) -> None:
    with FaultyNetwork(problem(status, code)) as network:
        with pytest.raises(raised, match="as scripted"):
            await connect(network.url).get_model("tiny")
        with pytest.raises(raised):
            await connect(network.url).publish_blueprint(blueprint_document())
        assert network.connections == 2


async def test_a_publish_is_repeated_under_one_idempotency_key(connect: Connect) -> None:
    with FaultyNetwork(hang_up, UNAVAILABLE, json_answer(PUBLICATION, 201)) as network:
        assert (await connect(network.url).publish_blueprint(blueprint_document())).version == 1
        keys = {re.search(rb"(?i)idempotency-key: (\S+)", sent)[1] for sent in network.requests}  # type: ignore[index]
        assert (network.connections, len(keys)) == (3, 1)
        await connect(network.url).publish_blueprint(blueprint_document(), idempotency_key="mine")
        assert b"mine" in network.requests[-1]


@pytest.mark.parametrize("fault", [UNAVAILABLE, hang_up])
async def test_a_post_without_an_idempotency_key_is_sent_once(connect: Connect, fault: bytes) -> None:
    with FaultyNetwork(fault) as network:
        with pytest.raises((ServiceUnavailable, ConnectionFailed)):
            await connect(network.url).create_lab("lab-b")
        assert network.connections == 1


async def test_retry_after_in_seconds_is_honoured(connect: Connect) -> None:
    with FaultyNetwork(problem(503, "service_unavailable", Retry_After="1"), json_answer(MODEL)) as network:
        began = time.monotonic()
        await connect(network.url).get_model("tiny")
        assert time.monotonic() - began >= 1


async def test_retry_after_as_a_date_is_honoured(connect: Connect) -> None:
    date = format_datetime(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3), usegmt=True)
    with FaultyNetwork(problem(429, "rate_limited", Retry_After=date), json_answer(MODEL)) as network:
        began = time.monotonic()
        await connect(network.url).get_model("tiny")
        assert time.monotonic() - began > 1.5


async def test_a_retry_after_beyond_the_deadline_is_reported_at_once(connect: Connect) -> None:
    with FaultyNetwork(problem(429, "rate_limited", Retry_After="3600")) as network:
        began = time.monotonic()
        with pytest.raises(RateLimited) as raised:
            await connect(network.url, timeout=5).get_model("tiny")
        assert raised.value.retry_after == 3600
        assert time.monotonic() - began < 2


async def test_no_answer_within_the_deadline_is_a_connection_failure(connect: Connect) -> None:
    began = time.monotonic()
    url = closed_port()
    with pytest.raises(ConnectionFailed, match=rf"{url} to GET /v1/models/tiny \(tried \w+ times"):
        await connect(url, timeout=2).get_model("tiny")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("fault", [lambda connection: time.sleep(5), drip(json_answer(MODEL), 0.05)])
async def test_the_deadline_holds_for_an_answer_that_stalls_or_drips(connect: Connect, fault: bytes) -> None:
    with FaultyNetwork(fault) as network:
        began = time.monotonic()
        with pytest.raises(ConnectionFailed):
            await connect(network.url, timeout=1).get_model("tiny")
        assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    "foreign",
    [
        answer(200, b"<html>Welcome to the hotel</html>", Content_Type="text/html"),
        answer(404, b"<html>Welcome to the hotel</html>", Content_Type="text/html"),
        answer(404, b'{"detail": "Welcome to the hotel"}', Content_Type="application/json"),
        json_answer('{"Welcome": "to the hotel"}'),
    ],
)
async def test_an_answer_of_something_else_is_named_as_such_with_an_excerpt(connect: Connect, foreign: bytes) -> None:
    with FaultyNetwork(foreign) as network:
        with pytest.raises(UnexpectedAnswer, match=r"to the hotel.*Is the URL that of a registry"):
            await connect(network.url).get_model("tiny")
        assert network.connections == 1


async def test_bytes_that_are_not_http_are_a_connection_failure(connect: Connect) -> None:
    with FaultyNetwork(b"SSH-2.0-OpenSSH_9.9\r\n") as network, pytest.raises(ConnectionFailed):
        await connect(network.url, timeout=0.5).get_model("tiny")


async def test_a_redirect_is_not_followed_and_no_other_origin_sees_the_key(connect: Connect) -> None:
    with FaultyNetwork(json_answer(MODEL)) as elsewhere:
        with FaultyNetwork(answer(307, Location=f"{elsewhere.url}/v1/models/tiny")) as network:
            with pytest.raises(UnexpectedAnswer, match="redirect to"):
                await connect(network.url, api_key=KEY).get_model("tiny")
            assert KEY.encode() in network.requests[0]
        assert elsewhere.connections == 0


async def test_the_next_page_is_asked_of_the_same_registry_wherever_it_points(connect: Connect) -> None:
    first = '{"models": [], "next": "http://127.0.0.1:9/v1/elsewhere?cursor=abc&limit=3"}'
    with FaultyNetwork(json_answer(first), json_answer('{"models": [' + MODEL + "]}")) as network:
        assert len(await connect(network.url, api_key=KEY).list_models()) == 1
        assert network.requests[1].startswith(b"GET /v1/models?cursor=abc&limit=3 ")


async def test_what_a_newer_registry_adds_to_an_answer_is_passed_over(connect: Connect) -> None:
    with FaultyNetwork(json_answer(MODEL[:-1] + ', "stars": 5}')) as network:
        assert (await connect(network.url).get_model("tiny")).model_id == "tiny"


async def test_a_code_of_a_newer_registry_is_raised_as_the_class_of_its_status(connect: Connect) -> None:
    with FaultyNetwork(problem(404, "dataset_not_found")) as network, pytest.raises(errors.NotFound, match="scripted"):
        await connect(network.url).get_model("tiny")


async def test_the_key_is_in_no_log_no_repr_and_no_error(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore2").setLevel(logging.DEBUG)
    with FaultyNetwork(hang_up, UNAVAILABLE, problem(403, "permission_denied")) as network:
        sdk = connect(network.url, api_key=KEY)
        with pytest.raises(errors.PermissionDenied) as raised:
            await sdk.get_model("tiny")
    assert network.connections == 3
    shown = [repr(sdk.client), repr(vars(sdk.client)), str(raised.value), repr(raised.value), caplog.text]
    assert "Trying again" in caplog.text
    assert not any("kkkk" in text for text in shown)


@pytest.mark.parametrize("key", ["gbr_kkkk\nHost: elsewhere", "gbr_kkkk\x00", "gbr_kkkké"])
def test_an_unusable_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Client("http://127.0.0.1:1", api_key=key, cache=False)
    assert "kkkk" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://registry",
        "https://",
        "https://user:secret@registry",
        "https://registry?key=1",
        "https://user:secret@registry:8000x",
        "https://registry:80000",
        "https://user:secret@[::1",
        "https://user:secret@registry\u2100",
    ],
)
def test_an_unusable_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLUEPRINTS_URL", raising=False)
    with pytest.raises(ConfigurationError) as raised:
        AsyncClient(url, cache=False)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://registry..\u00e9", "http://999.1.1.1", "http://registry/\x7f", "http://r/\udce9"]
)
async def test_a_host_that_cannot_be_is_found_out_by_the_first_call(connect: Connect, url: str) -> None:
    with pytest.raises(ConfigurationError, match="is no registry's URL"):
        await connect(url).get_model("tiny")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://u:secret@127.0.0.1:9", "http://u:secret@p:port"])
async def test_a_proxy_that_cannot_be_used_is_said_with_its_variables(
    connect: Connect, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with FaultyNetwork(json_answer(MODEL)) as network:
        with pytest.raises(ConfigurationError, match="ALL_PROXY, HTTPS_PROXY, HTTP_PROXY") as raised:
            await connect(network.url).get_model("tiny")
        assert "secret" not in str(raised.value)
        monkeypatch.setenv("NO_PROXY", "*")
        assert (await connect(network.url).get_model("tiny")).model_id == "tiny"


@pytest.mark.parametrize("seconds", [math.inf, 1e10])
async def test_a_timeout_of_centuries_is_one_of_days(connect: Connect, seconds: float) -> None:
    with FaultyNetwork(json_answer(MODEL)) as network:
        sdk = connect(network.url, timeout=seconds)
        assert (await sdk.get_model("tiny")).model_id == "tiny"
        assert sdk.timeout == 1e6


@pytest.mark.parametrize("timeout", [0, -1, math.nan, None, "5"])
def test_a_timeout_that_no_call_can_keep_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout="):
        Client("http://127.0.0.1:9", cache=False, timeout=timeout)


async def test_a_registry_may_live_under_a_path(connect: Connect) -> None:
    with FaultyNetwork(json_answer(MODEL)) as network:
        await connect(f"{network.url}/registry/").get_model("org/tiny")
        assert network.requests[0].startswith(b"GET /registry/v1/models/org/tiny ")


@pytest.mark.parametrize("model_id", ["../keys", "a/b/c", "", "a b", "tiny?x=1", "..", "a\n", 5])
async def test_a_model_id_cannot_lead_to_another_path(connect: Connect, model_id: str) -> None:
    with FaultyNetwork(json_answer(MODEL)) as network:
        with pytest.raises(ConfigurationError):
            await connect(network.url).get_model(model_id)
        assert network.connections == 0


@pytest.mark.parametrize("name", ["", ".", "..", 5])
async def test_a_name_cannot_lead_to_another_path(connect: Connect, name: str) -> None:
    with FaultyNetwork(json_answer(MODEL)) as network:
        sdk = connect(network.url)
        for call in (sdk.get_alias("tiny", name), sdk.delete_alias("tiny", name), sdk.cancel_job(name)):
            with pytest.raises(ConfigurationError, match="is no name"):
                await call
        assert network.connections == 0


def test_pauses_are_drawn_from_all_of_a_bound_that_doubles() -> None:
    for failures in (1, 2, 3, 20):
        bound = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1))
        drawn = [jitter(failures) for _ in range(400)]
        assert 0 <= min(drawn) < bound * 0.1
        assert bound * 0.9 < max(drawn) <= bound


EVENTS = b': keep-alive\n\nid: 1\nevent: job\ndata: {"a":\ndata: 1}\n\nid: 2\r\ndata: \xc3\xa9\r\n\r\nevent: job\n\n'


@given(st.lists(st.integers(0, len(EVENTS)), max_size=8))
def test_events_are_the_same_wherever_the_stream_was_cut(cuts: list[int]) -> None:
    parser = EventParser()
    places = [0, *sorted(cuts), len(EVENTS)]
    events = [event for a, b in itertools.pairwise(places) for event in parser.feed(EVENTS[a:b])]
    assert [(event.id, event.event, event.data) for event in events] == [
        ("1", "job", '{"a":\n1}'),
        ("2", "message", "é"),
    ]


def test_threads_whose_first_calls_come_at_once_share_one_pool_of_connections() -> None:
    with Client("http://127.0.0.1:9", cache=False) as client, ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def open_connections(_: int) -> int:
            barrier.wait()
            return id(client._client())

        assert len(set(pool.map(open_connections, range(8)))) == 1
