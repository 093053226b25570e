"""Aggregation and staleness through both clients and the command, and the paper's own function as the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradient_blueprints import Blueprint, Client, ConfigurationError, ModelNotFound, Verdict
from gradient_blueprints.blueprint_files import table_of_files
from gradient_blueprints.statistics_methods import local_sample
from gradient_blueprints.statistics_models import Advice
from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document, paper_example
from tests.sdk.conftest import Connect
from tests.sdk.test_cli import Run, blueprints, environment

__all__ = ["blueprints", "environment"]  # fixtures


def paper_aggregate_blueprints(blueprint_files: list[Path]) -> dict[tuple[str, float, str], dict[str, Any]]:
    """Appendix A.2 of the paper, its `return` moved out of the loop over the files, which it now closes."""
    combined = {}
    for fname in blueprint_files:
        data = json.loads(fname.read_text())
        model_id = data["model_id"]
        ckp = data["training_checkpoint"]
        for layer_info in data["layers"]:
            layer_id = layer_info["id"]
            key = (model_id, ckp, layer_id)
            combined[key] = layer_info
    return combined


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two models and two checkpoints, without a collision, with every kind of optional field."""
    rich = paper_example(training_checkpoint=1.0)
    rich["layers"][0] |= {
        "retained_mass": [[0.00001, 0.1], [0.5, 0.9]],
        "gradient_norm_ci": [0.05, 0.06],
        "alpha_ci": [1.4, 1.5],
        "domain_norms": {"bio": 1e-7},
        "tail_fit": {"method": "hill", "start": 0.01, "entries": 7},
        "kind": "attention",
        "depth": 0,
        "parameters": 12345678901,
        "signal": 5e-324,
    }
    documents = [PAPER_EXAMPLE, rich, blueprint_document("org/other", 0.5, layers=5)]
    paths = [tmp_path / f"blueprint-{number}.json" for number in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(json.dumps(document))
    return paths


async def test_files_give_the_rows_of_the_papers_function(connect: Connect, files: list[Path]) -> None:
    offline = connect("http://127.0.0.1:9", offline=True)
    rows = await offline.aggregate_blueprints(files=files)
    assert {row.key: row.layer.model_dump(mode="json", exclude_none=True) for row in rows} == (
        paper_aggregate_blueprints(files)
    )
    assert not any(row.collision for row in rows)


async def test_the_registry_gives_the_rows_of_the_papers_function(lab_a: Any, files: list[Path]) -> None:
    for path in files:
        await lab_a.publish_blueprint(path)
    rows = await lab_a.aggregate_blueprints(["foundation-7b", "org/other"])
    assert {row.key: row.layer.model_dump(mode="json", exclude_none=True) for row in rows} == (
        paper_aggregate_blueprints(files)
    )
    assert {(row.lab, row.version) for row in rows} == {("lab-a", 1)}


async def test_rows_that_the_papers_function_overwrites_are_both_there_and_flagged(
    lab_a: Any, files: list[Path], tmp_path: Path
) -> None:
    await lab_a.publish_blueprint(files[0])
    changed = paper_example()
    changed["layers"][0]["gradient_norm"] = 9.0
    del changed["layers"][1:]
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    rows = await lab_a.aggregate_blueprints("foundation-7b", files=[files[0], tmp_path / "changed.json", files[1]])
    told = [(row.layer.id, row.lab, row.layer.gradient_norm, row.collision) for row in rows]
    assert told[:3] == [
        ("attn.0", "lab-a", 0.052, True),
        ("ffn.0", "lab-a", 0.033, False),
        ("attn.1", "lab-a", 0.045, False),
    ]
    assert told[3] == ("attn.0", None, 9.0, True)
    assert len(told) == 7  # the published file itself is there once


async def test_files_are_narrowed_as_the_registry_narrows(
    connect: Connect, lab_a: Any, files: list[Path], tmp_path: Path
) -> None:
    tagged = blueprint_document("org/other", 0.9)
    tagged["layers"][1]["domain_tags"] = {"code": 0.0}
    files.append(tmp_path / "tagged.json")
    files[-1].write_text(json.dumps(tagged))
    for path in files:
        await lab_a.publish_blueprint(path)
    offline = connect("http://127.0.0.1:9", offline=True)
    models = ("foundation-7b", "org/other")
    for narrowed in (
        {"models": "org/other"},
        {"checkpoints": ["0.8", 0.9]},
        {"from_checkpoint": 0.8, "to_checkpoint": 0.9},
        {"tags": ["code", "nothing"]},
        {"checkpoints": [0.1]},
    ):
        told = [row.key for row in await lab_a.aggregate_blueprints(**{"models": models, **narrowed})]
        both = [row.key for row in await lab_a.aggregate_blueprints(**{"models": models, **narrowed}, files=files)]
        assert both == told, narrowed
        if "models" not in narrowed:
            alone = await offline.aggregate_blueprints(**narrowed, files=files)
            assert sorted(row.key for row in alone) == sorted(told), narrowed
    with pytest.raises(ConfigurationError, match="from_checkpoint lies after"):
        await offline.aggregate_blueprints(files=files, from_checkpoint=0.9, to_checkpoint=0.8)
    for versions in ("all", [1]):  # a file has none
        with pytest.raises(ConfigurationError, match="at least one of models, labs and digests"):
            await offline.aggregate_blueprints(files=files, versions=versions)


def test_a_file_given_twice_counts_once(files: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_text(files[0].read_text() + "\n")
    rows = list(table_of_files([files[0], files[0], copy]))
    assert len(rows) == 3
    assert not any(row.collision for row in rows)


def test_a_file_that_is_no_blueprint_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"model_id": "m", "training_checkpoint": 0.8, "layers": [{"id": "a"}]}')
    with pytest.raises(ConfigurationError, match=r"bad\.json.*layers/0/gradient_norm"):
        list(table_of_files([bad]))
    table = tmp_path / "spreadsheet.csv"
    table.write_text("model_id,training_checkpoint,id,gradient_norm\nm,0.8,caf\u00e9,1\n", encoding="cp1252")
    with pytest.raises(ConfigurationError, match=r"spreadsheet\.csv is not UTF-8: .* at byte 55"):
        list(table_of_files([table]))


async def test_a_selection_of_nothing_is_refused_before_it_is_sent(connect: Connect) -> None:
    with pytest.raises(ConfigurationError, match="at least one of models, labs and digests"):
        await connect("http://127.0.0.1:9").aggregate_blueprints()


async def test_an_unknown_model_is_an_error(lab_a: Any) -> None:
    with pytest.raises(ModelNotFound):
        await lab_a.aggregate_blueprints("nobody")


async def test_a_consensus_is_saved_as_a_blueprint_that_names_its_sources(
    connect: Connect, server: Server, tmp_path: Path
) -> None:
    digests = []
    for number, lab in enumerate(("lab-a", "lab-b", "lab-c")):
        client = connect(server.url, api_key=server.key(lab))
        publication = await client.publish_blueprint(blueprint_document(norm=10.0**number, layers=6))
        digests.append(publication.digest)
    (consensus,) = await client.consensus_blueprints("tiny")
    assert consensus.kendall_w == pytest.approx(1)
    blueprint = consensus.to_blueprint()
    assert blueprint.provenance is not None
    assert list(blueprint.provenance.sources or ()) == digests
    assert blueprint.layer("block.0.attn").gradient_norm == pytest.approx(10)
    assert (await client.publish_blueprint(blueprint)).version == 4


async def test_the_course_runs_over_the_checkpoints(lab_a: Any) -> None:
    for checkpoint in (0.5, 0.8, 1.0):
        await lab_a.publish_blueprint(blueprint_document(checkpoint=checkpoint, norm=checkpoint, layers=6))
    (course,) = await lab_a.training_courses("tiny")
    assert course.checkpoints == (0.5, 0.8, 1.0)
    assert [pair.spearman for pair in course.neighbours] == [1, 1]


# --- staleness

NORMS = {f"layer.{index}": math.exp(math.sin(index * 1.7)) for index in range(30)}


def batches(norms: dict[str, float], count: int = 12) -> dict[str, list[float]]:
    generator = np.random.default_rng(0)
    return {name: (norm * np.exp(0.1 * generator.standard_normal(count))).tolist() for name, norm in norms.items()}


def published(norms: dict[str, float] = NORMS) -> dict[str, Any]:
    layers = [{"id": name, "gradient_norm": norm} for name, norm in norms.items()]
    return blueprint_document() | {"layers": layers}


async def test_staleness_takes_batches_numbers_a_blueprint_and_a_file(lab_a: Any, tmp_path: Path) -> None:
    await lab_a.publish_blueprint(published())
    fresh = await lab_a.check_staleness("tiny", 0.8, batches(NORMS))
    assert (fresh.verdict, fresh.advice) == (Verdict.FRESH, Advice.USE)
    assert fresh.agreement.n == 30
    reversed_norms = dict(zip(NORMS, sorted(NORMS.values()), strict=True))
    blueprint = Blueprint.from_dict(published(reversed_norms))
    (tmp_path / "local.json").write_text(blueprint.to_json())
    answers = [
        await lab_a.check_staleness("tiny", 0.8, local)
        for local in (reversed_norms, blueprint, tmp_path / "local.json")
    ]
    assert {answer.verdict for answer in answers} == {Verdict.STALE}
    assert len({answer.other_digest for answer in answers}) == 1
    by_digest = await lab_a.check_staleness("tiny", 0.8, digest=fresh.digest)
    assert by_digest.agreement.spearman == 1


async def test_evidence_is_kept_with_consent_and_summarized(lab_a: Any) -> None:
    await lab_a.publish_blueprint(published())
    assert (await lab_a.check_staleness("tiny", 0.8, batches(NORMS), keep=True, domain="code")).kept
    again = await lab_a.check_staleness("tiny", 0.8, batches(NORMS), keep=True, domain="code")
    assert again.not_kept is not None
    (kept,) = await lab_a.list_evidence("tiny", 0.8, domain="code")
    assert kept.verdict is Verdict.FRESH
    (domain,) = (await lab_a.summarize_evidence("tiny")).domains
    assert (domain.users, domain.fresh, domain.alarm) == (1, 1, False)


async def test_arguments_that_do_not_fit_are_refused(lab_a: Any) -> None:
    unfit: list[dict[str, Any]] = [{}, {"local": {}}, {"local": {"a": 1.0}, "threshold": 2}]
    values: tuple[Any, ...] = (-1.0, "12", None, True, math.nan, 10**400, {}, b"12")  # "12" is not the batches 1 and 2
    unfit += [{"local": {"a": value}} for value in (*values, [], *([value] for value in values))]
    for arguments in unfit:
        with pytest.raises(ConfigurationError):
            await lab_a.check_staleness("tiny", 0.8, **arguments)


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    one, two = kind(0.5), kind(0.25)
    (alone,) = local_sample({"a": one}, "gradient_norm").layers
    (listed,) = local_sample({"a": [one, two]}, "gradient_norm").layers
    assert (alone.value, listed.batches) == (0.5, (0.5, 0.25))
    array: Any = np.array([0.5, 0.25])
    assert local_sample({"a": array}, "gradient_norm").layers == (listed,)


# --- the command


def test_the_command_aggregates_to_a_table_a_consensus_and_a_course(
    blueprints: Run, server: Server, tmp_path: Path, files: list[Path]
) -> None:
    for lab in ("lab-a", "lab-b"):
        with Client(server.url, api_key=server.key(lab), cache=False) as client:
            client.publish_blueprint(blueprint_document(norm=1.0 if lab == "lab-a" else 5.0))
    lines = blueprints("aggregate", "tiny", "--json").stdout.splitlines()
    assert [json.loads(line)["collision"] for line in lines] == [True] * 6
    assert "collides" in blueprints("aggregate", "tiny", "--file", files[0]).stdout
    assert "consensus of 2 labs" in blueprints("aggregate", "tiny", "--result", "consensus").stdout
    saved = tmp_path / "consensus.json"
    blueprints("aggregate", "tiny", "--result", "consensus", "--output", saved)
    assert len(Blueprint.from_json(saved.read_bytes()).layers) == 3
    assert "rising" in blueprints("aggregate", "tiny", "--result", "course").stdout
    blueprints("aggregate", "tiny", "--output", saved, code=2)
    blueprints("aggregate", "nobody", code=1)
    blueprints("aggregate", code=2)


def test_the_command_exits_1_when_a_blueprint_is_stale(blueprints: Run, server: Server, tmp_path: Path) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        client.publish_blueprint(published())
    sample = tmp_path / "local.json"
    sample.write_text(json.dumps(batches(NORMS)))
    shown = blueprints("stale", "tiny", "0.8", sample, "--domain", "cod").stdout
    assert "held against its general norms: it publishes none of 'cod'" in shown
    shown = blueprints("stale", "tiny", "0.8", sample).stdout
    assert "general norms" not in shown
    assert shown.startswith("fresh: use at level layer")
    assert "alone" not in shown
    sample.write_text(json.dumps(batches(dict(zip(NORMS, sorted(NORMS.values()), strict=True)))))
    answer = json.loads(blueprints("stale", "tiny", "0.8", sample, "--json", code=1).stdout)
    assert (answer["verdict"], answer["advice"]) == ("stale", "refresh")


def test_the_command_says_which_layers_a_check_could_not_compare(
    blueprints: Run, server: Server, tmp_path: Path
) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        client.publish_blueprint(published())
    sample = tmp_path / "local.json"
    first, *others = sorted(NORMS)
    sample.write_text(json.dumps(batches({name: NORMS[name] for name in others} | {"a": 1.0, "b": 2.0})))
    shown = blueprints("stale", "tiny", "0.8", sample).stdout
    assert f"1 layers on the published side alone, such as {first!r}\n" in shown
    assert "2 layers on the local side alone, such as 'a'\n" in shown
    sample.write_text('{"a": [1, 2, 3]}')
    refused = blueprints("stale", "tiny", "0.8", sample, code=2)
    assert refused.stdout == ""
    assert f"The local side has no layer of the published one ('a' against {first!r})" in refused.stderr
    told = blueprints("stale", "tiny", "0.8", sample, "--json", code=2)
    assert (json.loads(told.stdout)["matched"], told.stderr) == (0, refused.stderr)


@pytest.mark.parametrize("content", ['{"attn.0": null}', '{"attn.0": "12"}', "null", "[" * 100_000, '{"\\ud800": 1}'])
def test_a_local_file_that_holds_no_numbers_is_a_wrong_call_and_not_a_stale_blueprint(
    blueprints: Run, tmp_path: Path, content: str
) -> None:
    (tmp_path / "local.json").write_text(content)
    assert blueprints("stale", "tiny", "0.8", tmp_path / "local.json", code=2).stderr
