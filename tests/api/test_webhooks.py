"""Webhooks: who hears of what, what arrives, how often it is tried, and where nothing is sent."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpcore2
import httpx2
import pytest
from sqlalchemy import Engine, event

from app.database import create_engine, create_sessions
from app.registry import webhook_deliveries
from app.registry.webhook_deliveries import begin_attempt
from app.registry.webhooks import MOST_OF_A_LAB
from app.relay import Relay
from app.settings import Settings
from app.webhook_sender import PublicBackend, WebhookSender
from gradient_blueprints import Client, ConfigurationError, Conflict, Scope, WebhookNotFound
from gradient_blueprints.addresses import AddressRefused, read_network
from gradient_blueprints.webhook_models import DeliveryState, WebhookDelivery, WebhookEvent
from tests.api.test_staleness import keep, other_norms, published
from tests.conftest import Server, execute, fresh_database, make_settings, serving
from tests.documents import blueprint_document
from tests.receiver import Receiver, receiving

REPOSITORY = Path(__file__).parents[2]
HERE = (read_network("127.0.0.0/8"),)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Receivers on this machine are allowed, and failed messages tried twice more at once."""
    quick = {"webhook_networks": HERE, "webhook_retry_seconds": (0.05, 0.05)}
    return make_settings(database_url, tmp_path).model_copy(update=quick)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def lab(make_client: Callable[..., Client]) -> Client:
    return make_client("lab-a", Scope.READ, Scope.PUBLISH, Scope.PROFILE)


def send(settings: Settings) -> None:
    """What the relay does, until no message waits any more."""

    async def run() -> None:
        engine = create_engine(settings)
        awake = asyncio.Event()
        sender = WebhookSender(settings, create_sessions(engine), awake)
        connection = await asyncpg.connect(settings.database_url)
        try:
            async with asyncio.timeout(30):
                while await connection.fetchval("SELECT count(*) FROM webhook_deliveries WHERE state = 'waiting'"):
                    awake.clear()
                    await sender.begin_due()
                    await awake.wait()
        finally:
            await connection.close()
            await sender.close()
            await engine.dispose()

    asyncio.run(run())


def publish(client: Client, model_id: str = "tiny", norm: float = 0.1) -> str:
    return client.publish_blueprint(blueprint_document(model_id, norm=norm)).digest


# --- what is heard


def test_every_event_arrives_once_with_a_signature_that_verifies(
    server: Server, settings: Settings, lab: Client, publisher: httpx2.Client, receiver: Receiver
) -> None:
    webhook = lab.create_webhook(receiver.url, WebhookEvent)
    first = lab.publish_blueprint(published())
    lab.publish_blueprint(published())  # the same again is no event
    lab.set_alias("tiny", "stable", 0.8, 1)
    lab.delete_alias("tiny", "stable")
    for number in range(3):
        keep(publisher, {"Authorization": f"Bearer {server.key(f'user-{number}', Scope.READ)}"}, other_norms())
    lab.yank_version("tiny", 0.8, 1, reason="a bad run")
    lab.yank_version("tiny", 0.8, 1, reason="again")
    job = lab.cancel_job(lab.submit_checkpoint("tiny", 0.8, source="/x", data={"general": "/y.txt"}).id)
    send(settings)

    told = [message.verified(webhook.secret) for message in receiver.received]
    where = {"model_id": "tiny", "training_checkpoint": 0.8, "version": 1, "digest": first.digest}
    ended = {"job_id": job.id, "state": "cancelled", "reason": "cancelled by lab-a", "version": None, "digest": None}
    assert [(message["type"], message["data"]) for message in told] == [
        ("blueprint.published", where | {"lab": "lab-a"}),
        ("alias.moved", where | {"alias": "stable", "revision": 1}),
        ("alias.moved", {"model_id": "tiny", "alias": "stable", "revision": 2, "digest": None}),
        ("evidence.stale", where | {"lab": "lab-a", "domain": "code", "stale_share": 1.0, "users": 3}),
        ("blueprint.yanked", where | {"lab": "lab-a", "reason": "a bad run"}),
        ("job.finished", {"model_id": "tiny", "training_checkpoint": 0.8} | ended),
    ]
    assert len({message.id for message in receiver.received}) == len(told)
    assert [delivery.id for delivery in lab.list_webhook_deliveries(webhook.id)] == [
        message.id for message in reversed(receiver.received)
    ]


def test_a_lab_hears_of_its_own_models_and_of_those_it_names_but_never_of_anothers_jobs(
    settings: Settings, lab: Client, make_client: Callable[..., Client], receiver: Receiver
) -> None:
    other = make_client("lab-b", Scope.PUBLISH, Scope.PROFILE)
    other.create_webhook(receiver.url + "&owner", WebhookEvent)
    other.create_webhook(receiver.url + "&named", WebhookEvent, model_id="tiny")
    other.create_webhook(receiver.url + "&jobs", ["job.finished"])
    publish(lab)
    publish(other, norm=0.2)  # a version of a model that it does not own
    publish(other, "theirs")
    for client in (lab, other):
        client.cancel_job(client.submit_checkpoint("theirs", 0.8, source="/x", data={"general": "/y.txt"}).id)
    send(settings)
    heard = sorted(
        (message.path.partition("&")[2], message.body.partition(b'"data"')[0]) for message in receiver.received
    )
    events = [(who, body.split(b'"')[3].decode()) for who, body in heard]
    assert events == [
        ("jobs", "job.finished"),
        ("named", "blueprint.published"),
        ("named", "blueprint.published"),
        ("owner", "blueprint.published"),
        ("owner", "job.finished"),
    ]


def test_a_webhook_ends_with_the_key_that_made_it(
    server: Server, in_session: Callable[..., Any], lab: Client, admin: Client, receiver: Receiver
) -> None:
    key = admin.create_key("lab-a", [Scope.PUBLISH])
    with Client(server.url, api_key=key.secret, cache=False) as ending:
        webhook = ending.create_webhook(receiver.url, ["blueprint.published"])
    publish(lab)
    admin.revoke_key(key.id)
    publish(lab, norm=0.2)
    (shown,) = lab.list_webhooks()
    assert "has ended" in (shown.ended or "")
    assert [delivery.state for delivery in lab.list_webhook_deliveries(webhook.id)] == [DeliveryState.WAITING]
    assert not in_session(begin_attempt)


def sweep(settings: Settings) -> bool:
    """What the relay does now and then; whether it goes on at once."""

    async def run() -> bool:
        engine = create_engine(settings)
        try:
            return await Relay(settings, "redis://127.0.0.1:9/0")._sweep(create_sessions(engine))
        finally:
            await engine.dispose()

    return asyncio.run(run())


@pytest.mark.parametrize("how", ["revoked", "expired", "gone"])
def test_what_waits_for_an_ended_webhook_is_given_up_and_then_forgotten(
    settings: Settings, lab: Client, receiver: Receiver, database_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ended, held, live = (lab.create_webhook(receiver.url, ["blueprint.published"]) for _ in range(3))
    monkeypatch.setattr(webhook_deliveries, "FORGET_BATCH", 2)
    for webhook in (ended, ended, ended, held, live):
        lab.test_webhook(webhook.id)
    both = f"id IN ('{ended.id}', '{held.id}')"
    other_key = "INSERT INTO keys (lab_id, name, prefix, hash, scopes) SELECT lab_id, 'x', 'x', 'x', '{}' FROM webhooks"
    end = {
        "gone": f"UPDATE webhooks SET gone_at = now() WHERE {both}",
        "revoked": "UPDATE keys SET revoked_at = now() WHERE name = 'x'",
        "expired": "UPDATE keys SET expires_at = now() WHERE name = 'x'",
    }
    execute(
        database_url,
        f"{other_key} LIMIT 1",
        f"UPDATE webhooks SET key_id = (SELECT id FROM keys WHERE name = 'x') WHERE {both}",
        f"UPDATE webhooks SET held_until = now() + interval '1 minute' WHERE id = '{held.id}'",
        end[how],
    )
    assert [sweep(settings) for _ in range(2)] == [True, False]  # True: there is more
    (given_up,) = {one.state for one in lab.list_webhook_deliveries(ended.id)}
    assert given_up is DeliveryState.GIVEN_UP
    for webhook in (held, live):
        assert [one.state for one in lab.list_webhook_deliveries(webhook.id)] == [DeliveryState.WAITING]
    long_ago = "UPDATE webhook_deliveries SET finished_at = now() - interval '31 days'"
    execute(database_url, f"{long_ago} WHERE state <> 'waiting'")
    assert [sweep(settings) for _ in range(2)] == [True, False]
    assert [len(list(lab.list_webhook_deliveries(webhook.id))) for webhook in (ended, held, live)] == [0, 1, 1]


# --- attempts


def attempts(client: Client, webhook_id: Any) -> tuple[WebhookDelivery, list[tuple[int | None, str | None]]]:
    (delivery,) = client.list_webhook_deliveries(webhook_id)
    return delivery, [(attempt.status, attempt.fault) for attempt in delivery.attempts]


def test_a_message_is_tried_again_under_the_same_id_until_it_arrives(
    settings: Settings, lab: Client, receiver: Receiver
) -> None:
    webhook = lab.create_webhook(receiver.url, ["blueprint.published"])
    receiver.answers += [(503, {}), (302, {"Location": "http://127.0.0.1:9/elsewhere"})]
    asked = lab.test_webhook(webhook.id)
    assert (asked.event, asked.state, asked.attempts) == ("webhook.test", DeliveryState.WAITING, ())
    send(settings)
    delivery, tried = attempts(lab, webhook.id)
    assert delivery.state is DeliveryState.DELIVERED
    assert tried == [(503, None), (302, "redirects are not followed; give the URL that it leads to"), (204, None)]
    assert [message.id for message in receiver.received] == [asked.id] * 3
    assert {message.body for message in receiver.received} == {receiver.received[0].body}
    for message in receiver.received:
        message.verified(webhook.secret)


def test_a_message_that_another_relay_sent_meanwhile_holds_up_no_other_webhook(
    in_session: Callable[..., Any], lab: Client, receiver: Receiver, database_url: str
) -> None:
    first, second = (lab.create_webhook(receiver.url, ["blueprint.published"]) for _ in range(2))
    for webhook in (first, second):
        lab.test_webhook(webhook.id)
    sent = f"UPDATE webhook_deliveries SET state = 'delivered', finished_at = now() WHERE webhook_id = '{first.id}'"

    def send_first(*call: object) -> None:
        if "ORDER BY webhook_deliveries.due_at" in str(call[2]):  # the second look
            execute(database_url, sent)

    event.listen(Engine, "before_cursor_execute", send_first)
    try:
        attempt = in_session(begin_attempt)
    finally:
        event.remove(Engine, "before_cursor_execute", send_first)
    assert attempt is not None
    assert attempt.webhook_id == second.id


def test_a_message_that_never_arrives_is_given_up_and_the_next_one_is_sent(
    settings: Settings, lab: Client, receiver: Receiver
) -> None:
    webhook = lab.create_webhook(receiver.url, ["blueprint.published"])
    receiver.answers += [(500, {})] * 3
    lab.test_webhook(webhook.id)
    send(settings)
    delivery, tried = attempts(lab, webhook.id)
    assert (delivery.state, tried) == (DeliveryState.GIVEN_UP, [(500, None)] * 3)
    publish(lab)
    send(settings)
    assert next(iter(lab.list_webhook_deliveries(webhook.id))).state is DeliveryState.DELIVERED


def test_one_that_is_gone_hears_nothing_more(settings: Settings, lab: Client, receiver: Receiver) -> None:
    webhook = lab.create_webhook(receiver.url, ["blueprint.published"])
    receiver.answers.append((410, {}))
    lab.test_webhook(webhook.id)
    publish(lab)
    send(settings)
    publish(lab, norm=0.2)
    deliveries = list(lab.list_webhook_deliveries(webhook.id))
    assert [delivery.state for delivery in deliveries] == [DeliveryState.GIVEN_UP] * 2
    assert len(receiver.received) == 1
    assert next(iter(lab.list_webhooks())).ended == "it answered 410 Gone"


def test_a_message_outlives_a_relay_that_is_killed_while_it_sends(
    settings: Settings, lab: Client, receiver: Receiver, valkey_url: str, database_url: str
) -> None:
    webhook = lab.create_webhook(receiver.url, ["blueprint.published"])
    receiver.open.clear()

    def relay() -> subprocess.Popen[bytes]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        own = {
            "BLUEPRINTS_DATABASE_URL": settings.database_url,
            "BLUEPRINTS_SECRET": settings.secret.get_secret_value(),
            "BLUEPRINTS_BROKER_URL": valkey_url,
            "BLUEPRINTS_WEBHOOK_NETWORKS": "127.0.0.0/8",
        }
        return subprocess.Popen([sys.executable, "-m", "app", "relay"], cwd=REPOSITORY, env=clean | own)

    process = relay()
    try:
        digest = publish(lab)
        assert receiver.arrived.wait(30)
        process.kill()
        process.wait()
        receiver.open.set()
        receiver.arrived.clear()
        execute(database_url, "UPDATE webhooks SET held_until = now()")  # as time would
        process = relay()
        assert receiver.arrived.wait(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    first, second = receiver.received
    assert first.id == second.id
    assert second.verified(webhook.secret)["data"]["digest"] == digest
    delivery, tried = attempts(lab, webhook.id)
    assert tried == [(None, None), (204, None)]
    assert delivery.state is DeliveryState.DELIVERED


# --- where nothing is sent


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://127.0.0.1/hook", "is not a public address"),
        ("https://169.254.169.254/latest/meta-data", "is not a public address"),
        ("https://[::1]:8443/", "is not a public address"),
        ("https://[::ffff:10.0.0.1]/", "is not a public address"),
        ("https://[64:ff9b::a9fe:a9fe]/", "is not a public address"),
        ("https://127.1/", "is not an address"),
        ("https://2130706433/", "is not an address"),
        ("http://hooks.example.org/", "use https"),
        ("https://user:password@hooks.example.org/", "no user, password or fragment"),
        ("https://hooks.example.org/#part", "no user, password or fragment"),
        ("https:///hook", "give a URL"),
        ("https://hooks.example.org:99999/", "give a URL"),
        ("ftp://hooks.example.org/", "match pattern"),
        ("https://hooks.example.org/a b", "match pattern"),
    ],
)
def test_a_url_that_nothing_is_sent_to_is_refused_with_its_reason(url: str, reason: str, closed: httpx2.Client) -> None:
    answer = closed.post("/v1/webhooks", json={"url": url, "events": ["job.finished"]})
    assert answer.status_code == 422
    (place,) = answer.json()["errors"]
    assert place["pointer"] == "/url"
    assert reason in place["detail"]


@pytest.fixture(scope="module")
def closed_server(
    postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A registry as an operator gets it: no private networks are allowed."""
    with (
        fresh_database(postgres_url, template_database) as url,
        serving(make_settings(url, tmp_path_factory.mktemp("closed"))) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def closed(closed_server: Server) -> Iterator[httpx2.Client]:
    authorization = {"Authorization": f"Bearer {closed_server.key('lab-a')}"}
    with httpx2.Client(base_url=closed_server.url, headers=authorization, timeout=60) as http:
        yield http


def test_a_name_that_leads_to_a_private_address_is_refused_at_the_connection(
    closed_server: Server, closed: httpx2.Client, receiver: Receiver
) -> None:
    """`localhost` is a name like any other; what it answers is looked at each time a message is sent."""
    port = receiver.url.split(":")[2].partition("/")[0]
    made = closed.post("/v1/webhooks", json={"url": f"https://localhost:{port}/", "events": ["job.finished"]}).json()
    closed.post(f"/v1/webhooks/{made['id']}/test")
    send(closed_server.settings.model_copy(update={"webhook_retry_seconds": (0.01,)}))
    (delivery,) = closed.get(f"/v1/webhooks/{made['id']}/deliveries").json()["deliveries"]
    assert delivery["state"] == "given_up"
    assert {attempt["fault"].endswith("is not a public address") for attempt in delivery["attempts"]} == {True}
    assert receiver.connections == 0


async def test_the_other_end_of_an_open_connection_is_looked_at_too(receiver: Receiver) -> None:
    """Were a name to answer differently between the look and the connection."""
    port = int(receiver.url.split(":")[2].partition("/")[0])
    backend = PublicBackend(networks=())
    stream = await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", port)
    with pytest.raises(AddressRefused, match=r"127\.0\.0\.1 is not a public address"):
        await backend.check_peer(stream)
    with pytest.raises(httpcore2.ReadError):
        await stream.read(1, timeout=5)


# --- whose they are


def test_a_webhook_is_its_labs_and_the_administrators_and_its_secret_is_told_once(
    lab: Client, admin: Client, make_client: Callable[..., Client], receiver: Receiver, database_url: str
) -> None:
    webhook = lab.create_webhook(receiver.url, ["job.finished", "alias.moved"])
    other = make_client("lab-b", Scope.PUBLISH, Scope.PROFILE)
    assert list(other.list_webhooks()) == []
    for call in (other.delete_webhook, other.test_webhook, lambda name: list(other.list_webhook_deliveries(name))):
        with pytest.raises(WebhookNotFound):
            call(webhook.id)
    (shown,) = admin.list_webhooks()
    assert (shown.lab, shown.url, shown.events) == ("lab-a", receiver.url, ("alias.moved", "job.finished"))
    entry = next(entry for entry in admin.list_audit() if entry.action == "webhook.create")
    assert "of-the-url" not in entry.model_dump_json()
    assert webhook.secret not in shown.model_dump_json() + entry.model_dump_json() + repr(webhook)
    lab.test_webhook(webhook.id)
    lab.delete_webhook(webhook.id)
    assert list(lab.list_webhooks()) == []
    with pytest.raises(WebhookNotFound):
        lab.delete_webhook(webhook.id)


def test_a_lab_has_so_many_webhooks_and_no_more(lab: Client, receiver: Receiver) -> None:
    made = [lab.create_webhook(receiver.url, ["job.finished"]) for _ in range(MOST_OF_A_LAB)]
    assert len({webhook.secret for webhook in made}) == MOST_OF_A_LAB
    with pytest.raises(Conflict, match="delete one first"):
        lab.create_webhook(receiver.url, ["job.finished"])
    assert [webhook.id for webhook in lab.list_webhooks(limit=3)] == sorted(webhook.id for webhook in made)[:3]
    with pytest.raises(ConfigurationError, match="url"):
        lab.create_webhook("nowhere", ["job.finished"])


def test_the_python_of_the_page_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEPRINTS_URL", server.url)
    monkeypatch.setenv("BLUEPRINTS_API_KEY", server.key("lab-a"))
    page = (REPOSITORY / "docs" / "webhooks.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/webhooks.md", "exec"), names)
    finally:
        names["client"].close()
