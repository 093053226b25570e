"""Every method against the real service over a socket."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradient_blueprints import (
    AliasNotFound,
    AsyncClient,
    Blueprint,
    Client,
    ConfigurationError,
    InvalidDocument,
    PermissionDenied,
    PreconditionFailed,
    Scope,
    Unauthenticated,
)
from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document, paper_example
from tests.sdk.conftest import Connect


async def test_the_papers_example_comes_back_equal_in_every_form(lab_a: Any, tmp_path: Path) -> None:
    blueprint = Blueprint.from_dict(PAPER_EXAMPLE)
    (tmp_path / "blueprint.json").write_text(blueprint.to_json())
    (tmp_path / "blueprint.csv").write_text(blueprint.to_csv(), newline="")
    blueprint.save_pretrained(tmp_path / "model")
    forms: list[Any] = [
        PAPER_EXAMPLE,
        blueprint,
        blueprint.to_json(),
        blueprint.to_json().encode(),
        blueprint.to_csv(),
        tmp_path / "blueprint.json",
        str(tmp_path / "blueprint.json"),
        tmp_path / "blueprint.csv",
        tmp_path / "model",
    ]
    published = [await lab_a.publish_blueprint(form) for form in forms]
    assert [publication.created for publication in published] == [True] + [False] * (len(forms) - 1)
    assert {(publication.version, publication.digest) for publication in published} == {(1, blueprint.digest)}
    fetched = await lab_a.fetch_blueprint("foundation-7b", 0.8)
    assert fetched.to_dict() == blueprint.to_dict()
    assert (fetched.version, fetched.digest, fetched.lab) == (1, blueprint.digest, "lab-a")


async def test_numbers_of_numpy_are_published_as_numbers(lab_a: Any) -> None:
    layers = [{"id": "attn.0", "gradient_norm": np.float32(0.5), "parameters": np.int64(7)}]
    await lab_a.publish_blueprint({"model_id": "tiny", "training_checkpoint": 0.8, "layers": layers})
    layer = (await lab_a.fetch_blueprint("tiny", 0.8)).layers[0]
    assert (layer.gradient_norm, layer.parameters) == (0.5, 7)


async def test_what_is_dubious_is_told_with_the_publication_and_with_the_fetch(connect: Connect, lab_a: Any) -> None:
    layers = [{"id": "attn.0", "gradient_norm": 0.1, "k_star": 1.5}]
    published = await lab_a.publish_blueprint(blueprint_document(layers=1) | {"layers": layers})
    assert published.warnings
    fetched = await connect(lab_a.url, cache=False).fetch_blueprint("tiny", 0.8)
    assert fetched.warnings == published.warnings


async def test_an_invalid_document_is_an_error_that_points_to_the_places(lab_a: Any) -> None:
    document = paper_example()
    document["layers"][1]["gradient_norm"] = -1
    with pytest.raises(InvalidDocument) as raised:
        await lab_a.publish_blueprint(document)
    assert [place["pointer"] for place in raised.value.errors] == ["/layers/1/gradient_norm"]
    assert "/layers/1/gradient_norm" in str(raised.value)


async def test_numbers_that_json_has_no_words_for_are_pointed_to(connect: Connect) -> None:
    document = paper_example(extra={"a/b": [np.float64("inf")], "NaN": "a name"})
    document["layers"][2]["alpha"] = float("nan")
    with pytest.raises(InvalidDocument) as raised:
        await connect("http://127.0.0.1:9").publish_blueprint(document)
    assert [place["pointer"] for place in raised.value.errors] == ["/layers/2/alpha", "/extra/a~1b/0"]


async def test_what_is_no_document_at_all_is_refused_before_anything_is_sent(lab_a: Any) -> None:
    with pytest.raises(ConfigurationError, match="int cannot be published"):
        await lab_a.publish_blueprint(7)
    for unfit in (object(), "\ud800"):
        with pytest.raises(ConfigurationError, match="not JSON data"):
            await lab_a.publish_blueprint({"model_id": unfit})
    with pytest.raises(FileNotFoundError):
        await lab_a.publish_blueprint("no-such-file.json")


async def test_a_faulty_member_is_the_only_fault_of_its_argument(lab_a: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"make a NewWebhook: events\.0: Input should be") as refused:
        await lab_a.create_webhook("https://example.org/hook", ["job.finish"])
    assert "at least 1 item" not in str(refused.value)
    with pytest.raises(ConfigurationError, match=r"events: .*at least 1 item"):
        await lab_a.create_webhook("https://example.org/hook", [])


async def test_the_nearest_checkpoint_says_which_it_is(lab_a: Any) -> None:
    for checkpoint in (0.2, 0.5):
        await lab_a.publish_blueprint(blueprint_document("org/tiny", checkpoint))
    assert (await lab_a.fetch_blueprint("org/tiny", 0.8, nearest=True)).training_checkpoint == 0.5
    assert (await lab_a.fetch_blueprint("org/tiny", 0.5, version=1)).training_checkpoint == 0.5


async def test_another_labs_blueprint_is_reachable_by_its_name_only(
    connect: Connect, server: Server, lab_a: Any
) -> None:
    lab_b = connect(server.url, api_key=server.key("lab-b"))
    await lab_a.publish_blueprint(blueprint_document(norm=1.0))
    await lab_b.publish_blueprint(blueprint_document(norm=2.0))
    assert (await lab_a.fetch_blueprint("tiny", 0.8)).lab == "lab-a"
    assert (await lab_a.fetch_blueprint("tiny", 0.8, lab="lab-b")).version == 2
    assert (await lab_a.fetch_blueprint("tiny", 0.8, lab="*")).lab == "lab-b"


async def test_listings_go_on_over_all_pages_and_stop_at_the_limit(lab_a: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradient_blueprints.calls.PAGE_SIZE", 2)
    for number in range(5):
        await lab_a.publish_blueprint(blueprint_document(f"model-{number}", norm=1.0))
        await lab_a.publish_blueprint(blueprint_document("model-0", norm=number + 2.0))
    ids = [model.model_id for model in await lab_a.list_models()]
    assert sorted(ids) == [f"model-{number}" for number in range(5)]
    assert len(set(ids)) == 5
    for limit in (0, 1, 2, 3, 4, 50):
        assert [model.model_id for model in await lab_a.list_models(limit=limit)] == ids[:limit]
    assert [model.model_id for model in await lab_a.list_models("el-3")] == ["model-3"]
    versions = [version.version for version in await lab_a.list_versions("model-0", 0.8)]
    assert versions == [6, 5, 4, 3, 2, 1]
    assert (await lab_a.get_model("model-0")).versions == 6
    assert [row.newest for row in await lab_a.list_checkpoints("model-0")] == [6]


async def test_a_yanked_version_is_skipped_and_comes_back(lab_a: Any) -> None:
    for norm in (1.0, 2.0):
        await lab_a.publish_blueprint(blueprint_document(norm=norm))
    assert (await lab_a.yank_version("tiny", 0.8, 2, reason="wrong data")).yanked
    assert (await lab_a.fetch_blueprint("tiny", 0.8)).version == 1
    assert not (await lab_a.unyank_version("tiny", 0.8, 2)).yanked
    assert (await lab_a.fetch_blueprint("tiny", 0.8)).version == 2


async def test_an_alias_moves_only_from_the_revision_that_was_read(lab_a: Any) -> None:
    for norm in (1.0, 2.0):
        await lab_a.publish_blueprint(blueprint_document(norm=norm))
    first = await lab_a.set_alias("tiny", "stable", 0.8, 1, if_revision=0)
    with pytest.raises(PreconditionFailed):
        await lab_a.set_alias("tiny", "stable", 0.8, 2, if_revision=0)
    second = await lab_a.set_alias("tiny", "stable", 0.8, 2, if_revision=first.revision)
    with pytest.raises(PreconditionFailed):
        await lab_a.set_alias("tiny", "stable", 0.8, 1, if_revision=first.revision)
    assert await lab_a.get_alias("tiny", "stable") == second
    assert (await lab_a.fetch_by_alias("tiny", "stable")).version == 2
    assert [alias.name for alias in await lab_a.list_aliases("tiny")] == ["stable"]
    await lab_a.delete_alias("tiny", "stable", if_revision=second.revision)
    assert {move.version for move in await lab_a.alias_history("tiny", "stable")} == {1, 2, None}
    with pytest.raises(AliasNotFound):
        await lab_a.get_alias("tiny", "stable")


async def test_a_comparison_takes_checkpoints_and_versions_in_every_spelling(lab_a: Any) -> None:
    await lab_a.publish_blueprint(blueprint_document(checkpoint=0.5))
    await lab_a.publish_blueprint(blueprint_document(checkpoint=0.8, norm=0.2))
    by_number = await lab_a.compare_blueprints("tiny", 0.5, 0.8, top=1)
    assert by_number.matched == 3
    assert by_number.layers[0].ratio == pytest.approx(2)
    assert await lab_a.compare_blueprints("tiny", (0.50, 1), "0.8@1", top=1) == by_number
    with pytest.raises(ConfigurationError):
        await lab_a.compare_blueprints("tiny", "0.5@one", 0.8)


async def test_labs_and_keys_are_made_listed_and_ended(connect: Connect, server: Server) -> None:
    admin = connect(server.url, api_key=server.admin_key)
    await admin.create_lab("lab-c")
    expires = datetime.now(UTC) + timedelta(days=1)
    issued = await admin.create_key("lab-c", ["read", Scope.PUBLISH], name="laptop", expires_at=expires)
    assert issued.secret not in repr(issued)
    sdk = connect(server.url, api_key=issued.secret)
    caller = await sdk.whoami()
    assert (caller.lab, set(caller.scopes)) == ("lab-c", {"read", "publish"})
    assert issued.secret.startswith(caller.key_prefix)
    assert "lab-c" in [lab.name for lab in await admin.list_labs()]
    assert issued.id in [key.id for key in await admin.list_keys()]
    await admin.revoke_key(issued.id)
    with pytest.raises(Unauthenticated):
        await sdk.whoami()
    actions = [entry.action for entry in await admin.list_audit(limit=10)]
    assert any("revoke" in action for action in actions)
    assert any("lab" in action for action in actions)


async def test_without_a_key_or_a_scope_a_write_is_refused(connect: Connect, server: Server) -> None:
    with pytest.raises(Unauthenticated):
        await connect(server.url).publish_blueprint(blueprint_document())
    with pytest.raises(PermissionDenied):
        await connect(server.url, api_key=server.key("lab-r", Scope.READ)).publish_blueprint(blueprint_document())


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    names = {name for name in dir(Client) if not name.startswith("_")}
    assert names == {name for name in dir(AsyncClient) if not name.startswith("_")}
    for name in names - {"url", "close"}:
        blocking, awaited = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert blocking.parameters == awaited.parameters, name
        assert inspect.getdoc(getattr(Client, name)), name
