"""Kinds and depths read off ids, bands, and finer layers that make up a coarser one."""

from __future__ import annotations

import pytest

from app.registry.grouping import depth_of, groups, kind_of, parts
from gradient_blueprints.statistics_models import Level


@pytest.mark.parametrize(
    ("layer", "kind", "depth"),
    [
        ("attn.0", "attention", 0),
        ("ffn.12", "feed_forward", 12),
        ("model.layers.3.self_attn.q_proj", "attention", 3),
        ("model.layers.31.post_attention_layernorm", "normalization", 31),
        ("model.embed_tokens", "embedding", None),
        ("lm_head", "head", None),
        ("transformer.h.5.mlp.c_fc", "feed_forward", 5),
        ("transformer.wte", "embedding", None),
        ("transformer.ln_f", "normalization", None),
        ("mystery", "other", None),
    ],
)
def test_ids_of_common_models_tell_kind_and_depth(layer: str, kind: str, depth: int | None) -> None:
    assert (kind_of(layer, None), depth_of(layer, None)) == (kind, depth)


def test_what_is_stated_counts_more_than_the_id() -> None:
    assert (kind_of("attn.0", "other"), depth_of("attn.0", 7)) == ("other", 7)


def test_bands_of_depth_are_even_and_layers_without_depth_stand_outside() -> None:
    layers = [f"attn.{depth}" for depth in range(16)] + ["lm_head"]
    bands = groups(Level.DEPTH_BAND, layers, [None] * 17, [None] * 17)
    assert [len(members) for members in bands.values()] == [2] * 8 + [1]
    assert bands["outside"] == [16]
    assert set(groups(Level.KIND, layers, [None] * 17, [None] * 17)) == {"attention", "head"}
    assert len(groups(Level.KIND_IN_DEPTH_BAND, layers, [None] * 17, [None] * 17)) == 9


def test_the_outermost_parts_make_up_a_layer_that_is_missing() -> None:
    available = dict.fromkeys(["attn.0.q", "attn.0.k", "attn.0.k.bias", "attn.1", "attn.01.q"])
    assert parts({"attn.0": None, "attn.1": None, "ffn.0": None}, available) == {"attn.0": ["attn.0.k", "attn.0.q"]}


def test_parts_whose_parameters_do_not_add_up_are_no_whole() -> None:
    available: dict[str, int | None] = {"attn.0.q": 10, "attn.0.k": 10}
    assert parts({"attn.0": 20}, available) == {"attn.0": ["attn.0.k", "attn.0.q"]}
    assert parts({"attn.0": 30}, available) == {}
    assert parts({"attn.0": 30}, {"attn.0.q": 10, "attn.0.k": None}) == {"attn.0": ["attn.0.k", "attn.0.q"]}
