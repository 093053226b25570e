"""The document: equality, digest, conversions without loss."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gradient_blueprints.models import Blueprint, ProfileOptions, format_checkpoint, parse_checkpoint
from tests.documents import PAPER_EXAMPLE, paper_example

numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
shares = st.floats(min_value=0, max_value=1)
tags = st.sampled_from(["general", "bio", "legal", "code.python", "code"])
ids = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20).filter(
    lambda text: text[0] not in "=+-@"
)
intervals = st.tuples(numbers, numbers).map(sorted)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
retained_mass = st.dictionaries(shares, shares, max_size=4).map(lambda curve: sorted(map(list, curve.items())))


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


layer_fields = optional(
    alpha=numbers,
    gamma=numbers,
    k_star=numbers,
    domain_tags=st.dictionaries(tags, numbers, min_size=1),
    parameters=st.integers(0, 2**53 - 1),
    kind=st.sampled_from(["attention", "head"]),
    depth=st.integers(0, 1000),
    gradient_norm_ci=intervals,
    tail_fit=st.fixed_dictionaries({"method": st.just("hill")}, optional={"ks": shares, "versus_lognormal": numbers}),
    signal=numbers,
    first_order=st.floats(allow_nan=False, allow_infinity=False),
    retained_mass=retained_mass.filter(len),
)
documents = st.builds(
    lambda layers, rest: {"model_id": "org/model", "training_checkpoint": 0.8, "layers": layers} | rest,
    st.dictionaries(ids, st.tuples(numbers, layer_fields), min_size=1, max_size=4).map(
        lambda named: [{"id": key, "gradient_norm": norm} | fields for key, (norm, fields) in named.items()]
    ),
    optional(
        schema_version=st.just(1),
        statistic=st.sampled_from(["mean", "median"]),
        cost_model=st.fixed_dictionaries({"fixed": numbers, "variable": numbers.filter(bool)}),
        provenance=optional(seed=st.integers(0, 9), data=st.dictionaries(tags, json_values, max_size=2)),
        extra=st.dictionaries(st.text(min_size=1, max_size=5), json_values, max_size=3),
    ),
)


@given(documents)
def test_a_document_survives_json_and_csv_with_its_digest(document: dict[str, Any]) -> None:
    blueprint = Blueprint.from_dict(document)
    assert Blueprint.from_json(blueprint.to_json()).digest == blueprint.digest
    assert Blueprint.from_json(blueprint.to_canonical_bytes()).digest == blueprint.digest
    assert Blueprint.from_csv(blueprint.to_csv()).digest == blueprint.digest


@given(documents, st.randoms())
def test_the_order_of_keys_does_not_change_the_digest(document: dict[str, Any], random: Any) -> None:
    keys = list(document)
    random.shuffle(keys)
    shuffled = {key: document[key] for key in keys}
    assert Blueprint.from_dict(shuffled).digest == Blueprint.from_dict(document).digest


def test_null_is_the_same_as_absent_except_within_extra() -> None:
    plain = Blueprint.from_dict(PAPER_EXAMPLE)
    assert Blueprint.from_dict(paper_example(provenance=None)).digest == plain.digest
    assert Blueprint.from_dict(paper_example(extra={"a": None})).to_dict()["extra"] == {"a": None}


def test_equal_documents_are_equal_and_hash_alike() -> None:
    one, other = Blueprint.from_dict(PAPER_EXAMPLE), Blueprint.from_json(json.dumps(PAPER_EXAMPLE))
    assert one == other
    assert len({one, other}) == 1
    assert one != Blueprint.from_dict(paper_example(statistic="mean"))


def test_a_blueprint_is_immutable() -> None:
    blueprint = Blueprint.from_dict(PAPER_EXAMPLE)
    with pytest.raises(ValidationError):
        blueprint.model_id = "other"  # type: ignore[misc] # the point of the test
    with pytest.raises(ValidationError):
        blueprint.layers[0].gradient_norm = 1.0  # type: ignore[misc] # the point of the test


def test_nothing_within_a_blueprint_can_be_changed() -> None:
    blueprint = Blueprint.from_dict(paper_example(extra={"a": {"b": [1]}}, provenance={"data": {"general": {"n": 1}}}))
    assert blueprint.extra is not None
    assert blueprint.provenance is not None
    for container in (
        blueprint.layers[0].domain_tags,
        blueprint.extra,
        blueprint.extra["a"],
        blueprint.provenance.data,
    ):
        with pytest.raises(TypeError, match="immutable"):
            container["x"] = 1  # type: ignore[index, call-overload] # the point of the test
    assert copy.deepcopy(blueprint) == pickle.loads(pickle.dumps(blueprint)) == blueprint


def test_columns_of_shares_may_stand_in_any_order() -> None:
    table = "model_id,training_checkpoint,id,gradient_norm,retained_mass.1.0,retained_mass.0.5\nm,0.8,a,1,1,0.9\n"
    assert Blueprint.from_csv(table).layer("a").retained_mass == ((0.5, 0.9), (1.0, 1.0))


def test_a_long_structure_survives_its_cell() -> None:
    blueprint = Blueprint.from_dict(paper_example(extra={"a": "x" * 300_000}))
    assert Blueprint.from_csv(blueprint.to_csv()) == blueprint


def test_it_is_saved_beside_a_model_and_read_back(tmp_path: Path) -> None:
    blueprint = Blueprint.from_dict(PAPER_EXAMPLE)
    assert blueprint.save_pretrained(tmp_path / "model") == tmp_path / "model" / "gradient_blueprint.json"
    assert Blueprint.from_pretrained(tmp_path / "model") == blueprint


def test_a_notebook_shows_the_largest_layers_and_no_markup_of_theirs() -> None:
    blueprint = Blueprint.from_dict(PAPER_EXAMPLE | {"layers": [{"id": "<b>bold", "gradient_norm": 1}]})
    shown = blueprint._repr_html_()
    assert "&lt;b&gt;bold" in shown
    assert "<b>bold" not in shown


@pytest.mark.parametrize("text", ["0.8\n", " 0.8", "\uff10.8", "0_1", "0." + "0" * 60, "", "nan", "high"])
def test_what_is_no_plain_decimal_is_no_checkpoint(text: str) -> None:
    with pytest.raises(ValueError, match="not a training checkpoint"):
        parse_checkpoint(text)


@pytest.mark.parametrize(("text", "canonical"), [("0.80", "0.8"), ("8e-1", "0.8"), ("1.0", "1"), ("0.0001", "0.0001")])
def test_checkpoints_have_one_spelling(text: str, canonical: str) -> None:
    assert format_checkpoint(text) == canonical
    assert parse_checkpoint(text) == parse_checkpoint(canonical)


def test_a_float_that_is_spelled_as_an_integer_keeps_its_digest_through_a_client() -> None:
    blueprint = Blueprint.from_dict(paper_example(extra={"a": 1e16, "b": 2.0**60}))
    assert b'"a":10000000000000000' in blueprint.to_canonical_bytes()
    assert Blueprint.from_json(blueprint.to_canonical_bytes()).digest == blueprint.digest


@pytest.mark.parametrize("integer", [2**53 + 1, 2**60, -(2**60), 10**400])
def test_an_integer_that_no_digest_could_name_is_refused_before_it_is_published(integer: int) -> None:
    with pytest.raises(ValidationError, match="/runs/1/seed~1a: the canonical form of this integer"):
        Blueprint.from_dict(paper_example(extra={"runs": [0, {"seed/a": integer}]}))


def test_a_changed_copy_has_its_own_digest_and_layers() -> None:
    blueprint = Blueprint.from_dict(PAPER_EXAMPLE)
    assert blueprint.digest
    assert blueprint.layer("attn.0").gradient_norm == 0.052
    shorter = blueprint.model_copy(update={"layers": blueprint.layers[1:]})
    assert shorter.digest == Blueprint.from_dict(shorter.to_dict()).digest != blueprint.digest
    with pytest.raises(KeyError):
        shorter.layer("attn.0")


@pytest.mark.parametrize("number", [True, "3"])
@pytest.mark.parametrize("name", ["batches", "batch_size", "seed", "shards", "sequence_length", "time_limit"])
def test_what_only_looks_like_a_number_is_no_option_of_a_job(name: str, number: object) -> None:
    assert ProfileOptions.model_validate({name: 3})
    with pytest.raises(ValidationError):
        ProfileOptions.model_validate({name: number})
