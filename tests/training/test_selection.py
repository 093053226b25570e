"""What `select` chooses: shares, budgets, layers by knapsack, coordinates within each tensor."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from gradient_blueprints.allocation import count, spearman
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.statistics_models import Staleness, Verdict
from gradient_blueprints.training.selection import (
    BYTES_PER_COORDINATE,
    BYTES_PER_DENSE_PARAMETER,
    Budget,
    LocalStatistics,
    ScoreName,
    Selection,
    Unit,
    default_trust,
    knapsack,
    select,
    spread,
)
from gradient_blueprints.training.selection.chosen import width_of
from gradient_blueprints.training.selection.indices import best, drawn, lowest, random_scores


def make_blueprint(
    norms: dict[str, float], sizes: dict[str, int] | None = None, **fields: Mapping[str, object]
) -> Blueprint:
    layers = [
        {"id": name, "gradient_norm": norm}
        | ({"parameters": sizes[name]} if sizes else {})
        | {field: values[name] for field, values in fields.items() if name in values}
        for name, norm in norms.items()
    ]
    return Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})


SIZES = {"a": 1000, "b": 1000, "c": 200}
PUBLISHED = make_blueprint({"a": 3.0, "b": 1.0, "c": 1.0}, SIZES)


def gradients_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(20, 50, generator=generator),
        "b.weight": torch.randn(50, 20, generator=generator),
        "c.weight": torch.randn(10, 20, generator=generator),
    }


def shares(selection: Selection) -> list[float]:
    return [round(layer.share, 6) for layer in selection.layers]


def test_a_selection_without_local_data_uses_the_published_shares() -> None:
    assert shares(select(PUBLISHED)) == [0.6, 0.2, 0.2]


def test_norms_are_blended_as_shares_whatever_their_scale() -> None:
    local = make_blueprint({"a": 100.0, "b": 300.0, "c": 100.0})
    assert shares(select(PUBLISHED, local, trust=0.25)) == [0.3, 0.5, 0.2]


def test_a_layer_that_the_local_sample_lacks_keeps_its_published_share() -> None:
    local = make_blueprint({"b": 1.0, "c": 3.0})
    assert shares(select(PUBLISHED, local, trust=0.0)) == [0.6, 0.1, 0.3]


def test_trust_is_lost_when_local_ranks_contradict_the_published() -> None:
    opposite = make_blueprint({"a": 1.0, "b": 2.0, "c": 3.0})
    assert default_trust(PUBLISHED.layers, opposite.layers) == 0


def test_trust_follows_the_precision_of_the_two_sides() -> None:
    norms = {"a": 3.0, "b": 1.0, "c": 2.0}
    tight = {name: [norm * 0.95, norm * 1.05] for name, norm in norms.items()}
    wide = {name: [norm * 0.8, norm * 1.2] for name, norm in norms.items()}
    surer, less_sure = (make_blueprint(norms, SIZES, gradient_norm_ci=width) for width in (tight, wide))
    assert default_trust(surer.layers, less_sure.layers) == pytest.approx(16 / 17)
    assert default_trust(less_sure.layers, surer.layers) == pytest.approx(1 / 17)
    assert select(surer, less_sure).trust == pytest.approx(16 / 17)
    assert select(less_sure, surer, staleness=checked(Verdict.INDETERMINATE)).trust == pytest.approx(0.5 / 17)
    assert default_trust(make_blueprint(norms).layers, surer.layers) == 0.5


@pytest.mark.parametrize(
    ("budget", "coordinates"),
    [(0.1, 220), (Budget.parameters(440), 440), (Budget.bytes(110 * BYTES_PER_COORDINATE), 110), (1.0, 2200)],
)
def test_a_budget_is_spent_and_not_exceeded(budget: float | Budget, coordinates: int) -> None:
    assert select(PUBLISHED, budget=budget).selected == coordinates


@pytest.mark.parametrize(("short", "expected"), [(0, ["a", "c"]), (1, ["a"])])
def test_bytes_buy_whole_layers_as_full_adamw_prices_them(short: int, expected: list[str]) -> None:
    budget = Budget.bytes(1200 * BYTES_PER_DENSE_PARAMETER - short)
    assert [layer.id for layer in select(PUBLISHED, budget=budget, unit="layer").layers if layer.selected] == expected


def test_a_budget_in_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fraction, parameters, bytes; not in 'params'"):
        Budget(1e6, "params")  # type: ignore[arg-type]


def test_a_budget_has_to_be_positive_and_a_fraction_at_most_one() -> None:
    for bad in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigurationError):
            select(PUBLISHED, budget=bad)


def test_every_layer_gets_the_even_fraction_where_k_star_is_unknown() -> None:
    assert [layer.fraction for layer in select(PUBLISHED, budget=0.1).layers] == pytest.approx([0.1, 0.1, 0.1])


def test_a_layer_with_larger_k_star_gets_more_within_limits() -> None:
    blueprint = make_blueprint({"a": 1.0, "b": 1.0}, {"a": 1000, "b": 1000}, k_star={"a": 0.001, "b": 0.9})
    a, b = (layer.fraction for layer in select(blueprint, budget=0.1).layers)
    assert a + b == pytest.approx(0.2)
    assert b / a == pytest.approx(2 / 0.5, rel=0.01)


def test_fractions_can_be_even_whatever_k_star_says_but_for_layers_without_any_gradient() -> None:
    norms, sizes = {"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 1000, "b": 3000, "c": 1000}
    blueprint = make_blueprint(norms, sizes, k_star={"a": 0.001, "b": 0.9, "c": 0.9})
    local = make_blueprint(norms, sizes, k_star={"a": 0.5, "b": 0.1, "c": 0.9})
    for beside in (None, local):
        selection = select(blueprint, beside, budget=0.1, fractions="even")
        assert [layer.fraction for layer in selection.layers] == pytest.approx([0.125, 0.125, 0])
    with pytest.raises(ConfigurationError, match="k_star or even, not 'uneven'"):
        select(blueprint, fractions="uneven")  # type: ignore[arg-type]


def test_a_layer_without_any_gradient_gets_nothing() -> None:
    blueprint = make_blueprint({"a": 0.0, "b": 1.0}, {"a": 1000, "b": 1000})
    selection = select(blueprint, budget=0.1)
    assert [layer.selected for layer in selection.layers] == [0, 200]
    assert selection.indices("a.weight", 1000) is not None
    assert len(selection.indices("a.weight", 1000)) == 0  # type: ignore[arg-type]  # just seen not to be None


def test_unknown_parameter_counts_are_an_error_that_names_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="pass model="):
        select(make_blueprint({"a": 1.0}))
    model = nn.ModuleDict({"a": nn.Linear(4, 5)})
    assert select(make_blueprint({"a": 1.0}), model=model, budget=0.2).selected == 5


def test_coordinates_are_those_with_the_largest_local_gradient_within_each_tensor() -> None:
    gradients = gradients_of()
    gradients["a.weight"] *= 1000  # a scale across tensors must not matter
    selection = select(PUBLISHED, budget=0.1, gradients=gradients)
    for name, gradient in gradients.items():
        expected = set(gradient.abs().flatten().topk(gradient.numel() // 10).indices.tolist())
        assert set(selection.parts[name].tolist()) == expected


def test_factors_score_a_coordinate_by_its_row_times_its_column() -> None:
    row, column = torch.rand(20), torch.rand(50)
    factors = {"code/a.weight/row": row, "code/a.weight/column": column}
    selection = select(PUBLISHED, budget=0.1, factors=factors)
    expected = set(torch.outer(row, column).flatten().topk(100).indices.tolist())
    assert set(selection.parts["a.weight"].tolist()) == expected
    assert list(selection.parts) == ["a.weight"]


def test_trust_moves_the_coordinates_from_the_local_gradient_to_the_published_factors() -> None:
    gradients = gradients_of()
    factors = {"code/a.weight/row": torch.rand(20), "code/a.weight/column": torch.rand(50)}

    def chosen(trust: float) -> set[int]:
        found = select(PUBLISHED, budget=0.1, gradients=gradients, factors=factors, trust=trust)
        return set(found.parts["a.weight"].tolist())

    local = set(select(PUBLISHED, budget=0.1, gradients=gradients).parts["a.weight"].tolist())
    published = set(select(PUBLISHED, budget=0.1, factors=factors).parts["a.weight"].tolist())
    assert chosen(0.0) == local
    assert chosen(1.0) == published
    assert len(chosen(0.5) & local) > len(chosen(1.0) & local)


def test_factors_of_several_domains_need_a_name() -> None:
    factors = {
        f"{domain}/a.weight/{side}": torch.rand(n)
        for domain in ("code", "law")
        for side, n in (("row", 20), ("column", 50))
    }
    with pytest.raises(ConfigurationError, match="code, law"):
        select(PUBLISHED, factors=factors)
    assert "a.weight" in select(PUBLISHED, factors=factors, domain="law").parts


def test_factors_of_another_shape_are_refused() -> None:
    for rows, columns in ((3, 3), (50, 20)):  # the latter the same matrix, transposed
        factors = {"code/a.weight/row": torch.rand(rows), "code/a.weight/column": torch.rand(columns)}
        with pytest.raises(ConfigurationError, match=rf"a\.weight is \(20, 50\).*rows \({rows},\)"):
            select(PUBLISHED, factors=factors, gradients=gradients_of(), trust=0.5)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    gradients = gradients_of()
    gradients["b.weight"][0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"b\.weight"):
        select(PUBLISHED, gradients=gradients)


def test_with_nothing_to_go_on_coordinates_are_random_and_always_the_same() -> None:
    first, again = (select(PUBLISHED, budget=0.1).indices("a.weight", 1000) for _ in range(2))
    other = select(PUBLISHED, budget=0.1, seed=1).indices("a.weight", 1000)
    assert first is not None
    assert again is not None
    assert other is not None
    assert len(first) == 100
    assert np.array_equal(first, again)
    assert len(np.intersect1d(first, other)) < 40
    assert first[:5].tolist() == [4, 12, 15, 26, 30]  # the same on every machine


def test_lots_are_drawn_without_much_memory() -> None:
    size = 2_000_000
    tracemalloc.start()
    lots = random_scores("w", size, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size  # 4 of them the answer; with 64-bit numbers for all of it 20
    assert lots[[0, 262_143, 262_144, -1]] == pytest.approx([0.76355249, 0.83050275, 0.29595143, 0.24336946])


def test_a_draw_by_scores_takes_little_memory() -> None:
    scores = np.linspace(1, 2, 2_000_000, dtype=np.float32)
    tracemalloc.start()
    keys = drawn(scores, 2.0, "w", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(scores)  # 4 of them the answer; with float64 of all of it 28
    uniform = random_scores("w#drawn", len(scores), 0).astype(np.float64) + 2.0**-25
    assert np.array_equal(keys, (np.log(scores) - 2 * np.log(-np.log(uniform))).astype(np.float32))


def test_ties_are_spread_over_the_tensor() -> None:
    gradients = {"a.weight": torch.zeros(20, 50)}
    gradients["a.weight"][0, :3] = 1.0
    chosen = select(PUBLISHED, budget=0.1, gradients=gradients | {"b.weight": torch.ones(1000)}).parts["a.weight"]
    assert len(chosen) == 100
    assert {0, 1, 2} <= set(chosen.tolist())
    assert chosen[-1] > 900


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_lowest_lots_are_the_first_of_their_stable_order(drawn: list[int], data: st.DataObject) -> None:
    lots = np.array(drawn, np.float32)
    count = data.draw(st.integers(1, len(lots)))
    expected = np.sort(np.argsort(lots, kind="stable")[:count])
    assert np.array_equal(np.flatnonzero(lowest(lots, count)), expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_the_best_are_the_first_by_score_then_lot_then_index(drawn: list[int], data: st.DataObject) -> None:
    scores = np.array(drawn, np.float32)
    count = data.draw(st.integers(0, len(scores)))
    expected = np.lexsort((random_scores("w", len(scores), 0), -scores))[:count]
    assert np.array_equal(best(scores, count, "w", 0), np.sort(expected))


def test_ties_are_broken_without_much_memory() -> None:
    """As in an embedding most of whose tokens the sample does not hold."""
    scores = np.zeros(2_000_000, np.float32)
    scores[:60_000] = 1.0
    tracemalloc.start()
    chosen = best(scores, 200_000, "w", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chosen) == 200_000
    assert peak < 8 * len(scores)  # beside the scores; with a lot for each of the tied 16


@pytest.mark.parametrize("way", ["file", "pickle", "copy"])
def test_a_selection_survives_its_file_and_other_processes(tmp_path: Path, way: str) -> None:
    selection = select(PUBLISHED, make_blueprint({"a": 1.0, "b": 2.0}), 0.1, gradients=gradients_of())
    again: Selection
    if way == "file":
        again = Selection.load(selection.save(tmp_path / "selection.safetensors"))
    else:
        again = copy.deepcopy(selection) if way == "copy" else pickle.loads(pickle.dumps(selection))
    assert again.retained_of == selection.retained_of
    assert again.layer_of("a.weight") == selection.layer_of("a.weight")
    assert (again.layers, again.trust, again.blueprint_digest) == (selection.layers, selection.trust, PUBLISHED.digest)
    assert again.parts.keys() == selection.parts.keys()
    assert again.columns == selection.columns
    for name, chosen in selection.parts.items():
        assert np.array_equal(again.parts[name], chosen)


@pytest.mark.parametrize(
    ("shape", "other"), [((6, 10), (10, 6)), ((2, 6, 10), (2, 10, 6)), ((6, 5, 2, 1), (5, 6, 2, 1))]
)
def test_coordinates_are_not_taken_for_those_of_a_transposed_tensor(
    tmp_path: Path, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """As when the weights of GPT-2's Conv1D were turned into those of nn.Linear."""
    blueprint = make_blueprint({"w": 1.0}, {"w": math.prod(shape)})
    chosen = select(blueprint, budget=0.1, gradients={"w": torch.randn(shape)})
    again = Selection.load(chosen.save(tmp_path / "selection.safetensors"))
    assert len(chosen.parts["w"]) == count(0.1, math.prod(shape)) > 0
    grown = (shape[0] + 4, *shape[1:])
    assert again.indices("w", math.prod(shape)) is again.parts["w"]  # the size alone will do
    assert again.units("w", grown).indices is again.parts["w"]  # new tokens stand at the end
    with pytest.raises(ConfigurationError, match=rf"{re.escape(str(other))}, and rows of .* Make a selection"):
        again.units("w", other)


def test_rows_of_a_tensor_above_2_31_entries_are_its_own_coordinates() -> None:
    small = select(make_blueprint({"w": 1.0}, {"w": 8}), budget=0.5, unit="row", gradients={"w": torch.ones(4, 2)})
    selection = replace(small, parts={"w": np.array([3_000_000])}, columns={"w": 1_000})
    assert selection.parts["w"].itemsize == 4
    chosen = selection.indices("w", (4_000_000, 1_000))
    assert chosen is not None
    assert (chosen[0], chosen[-1], len(chosen)) == (3_000_000_000, 3_000_000_999, 1_000)
    assert replace(small, parts={"w": np.array([2**31])}).parts["w"].tolist() == [2**31]


def test_a_selection_of_a_million_coordinates_is_a_small_file(tmp_path: Path) -> None:
    blueprint = make_blueprint({"w": 1.0}, {"w": 1_000_000})
    selection = select(blueprint, budget=0.1, gradients={"w": torch.randn(1000, 1000)})
    assert selection.save(tmp_path / "selection").stat().st_size < 100_000  # as int32 indices 400,000


def test_a_selection_cannot_be_changed() -> None:
    selection = select(PUBLISHED, gradients=gradients_of())
    with pytest.raises(AttributeError):
        selection.trust = 0.0  # type: ignore[misc]  # that it is refused is the test
    with pytest.raises(TypeError):
        selection.parts["a.weight"] = np.zeros(1, np.int64)  # type: ignore[index]  # likewise
    with pytest.raises(ValueError, match="read-only"):
        selection.parts["a.weight"][0] = 0


def test_the_summary_says_what_is_trained_and_what_it_takes() -> None:
    peaked = torch.ones(20, 50)
    peaked[:, 0] = 181.0  # a fiftieth of the coordinates with 0.787 of the sum
    blueprint = make_blueprint({"a": 3.0, "b": 1.0, "c": 0.0}, dict.fromkeys("abc", 1000))
    chosen = select(blueprint, budget=Budget.parameters(40), gradients={"a.weight": peaked}, trust=1.0)
    within = "empirical_bayes (tensors ranked: 1, at random: the others)"
    assert chosen.summary().splitlines() == [
        "m at 1, by coordinate",
        "40 of 3,000 parameters (1.3%)",
        f"in 2 of 3 layers by norm, within them by {within}; trust in the published side 1.00",
        "training memory 640 B, full AdamW 36.0 kB: 35.4 kB saved",
        "layer                                         parameters  fraction   share  gradient kept         saved",
        "a                                                  1,000      2.0%   75.0%          78.7%      11,680 B",
        "b                                                  1,000      2.0%   25.0%              –      11,680 B",
        "frozen, since their norm is 0: 1 layers (c…)",
    ]


def test_without_a_local_sample_the_summary_says_what_the_score_keeps() -> None:
    chosen = select(PUBLISHED, budget=0.1, factors=FACTORS)
    assert "score kept" in chosen.summary()
    assert chosen.retained_of == "score"


def test_the_gradient_that_is_kept_counts_what_is_drawn_at_random_too() -> None:
    gradients = {"a.weight": torch.ones(20, 50), "a.bias": torch.zeros(1000)}
    blueprint = make_blueprint({"a": 1.0}, {"a": 2000})
    layer = select(blueprint, budget=0.1, gradients=gradients, random_share=1.0).layers[0]
    assert layer.retained == pytest.approx(0.1)


def test_whole_layers_are_chosen_by_value_and_not_by_density() -> None:
    blueprint = make_blueprint({"head": 6.0, "x": 5.0, "y": 1.0}, {"head": 90, "x": 50, "y": 10})
    chosen = [
        layer.id for layer in select(blueprint, budget=Budget.parameters(100), unit="layer").layers if layer.selected
    ]
    assert chosen == ["head", "y"]  # greedy by density takes x and y


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=3, max_size=30))
def test_rank_correlation_is_that_of_scipy_with_ties(pairs: list[tuple[int, float]]) -> None:
    left, right = [float(a) for a, _ in pairs], [b for _, b in pairs]
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert spearman(left, right) is None
    else:
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


@given(
    items=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=9),
    capacity=st.integers(0, 120),
)
@settings(max_examples=300, deadline=None)
def test_the_knapsack_is_exact(items: list[tuple[int, int]], capacity: int) -> None:
    values, sizes = [float(value) for value, _ in items], [size for _, size in items]
    taken, exact = knapsack(values, sizes, capacity)
    assert exact
    best = max(
        sum(value for value, use in zip(values, uses, strict=True) if use)
        for uses in itertools.product([False, True], repeat=len(items))
        if sum(size for size, use in zip(sizes, uses, strict=True) if use) <= capacity
    )
    assert sum(size for size, use in zip(sizes, taken, strict=True) if use) <= capacity
    assert sum(value for value, use in zip(values, taken, strict=True) if use) == best


@given(
    layers=st.lists(st.tuples(st.integers(1, 1000), st.floats(0.5, 2.0)), min_size=1, max_size=10),
    share=st.floats(0.01, 1.0),
)
def test_fractions_spend_the_budget_and_none_exceeds_one(layers: list[tuple[int, float]], share: float) -> None:
    sizes = [size for size, _ in layers]
    fractions = spread(int(share * sum(sizes)), sizes, [weight for _, weight in layers])
    assert all(0 <= fraction <= 1 for fraction in fractions)
    spent = sum(fraction * size for fraction, size in zip(fractions, sizes, strict=True))
    assert spent == pytest.approx(int(share * sum(sizes)))


def test_between_groups_the_published_ranks_hold_and_within_them_size_alone_tells() -> None:
    published = make_blueprint({"a": 3.0, "b": 1.0, "c": 1.0}, SIZES, k_star={"a": 0.4, "c": 0.2})
    chosen = select(published, groups={"early": ["a", "c"], "late": ["b"]}, unit="layer", budget=1.0)
    group = 10**0.5  # of a and c: sqrt(3^2 + 1^2), spread as sqrt(1000 / 1200) and sqrt(200 / 1200)
    norms = [group * (5 / 6) ** 0.5, 1.0, group * (1 / 6) ** 0.5]
    assert shares(chosen) == [round(norm / sum(norms), 6) for norm in norms]
    fractions = {layer.id: layer.fraction for layer in select(published, groups={"early": ["a", "c"]}).layers}
    assert fractions["a"] == pytest.approx(fractions["c"]), "one k_star for the group"
    assert select(published, groups={"early": ["a", "c"]}).blueprint_digest == published.digest


def test_groups_stand_for_the_layers_below_them_and_what_is_in_none_makes_up_one_more() -> None:
    sizes = dict.fromkeys(("h.0.attn.q", "h.0.attn.k", "h.0.mlp", "h.1.mlp", "h.1.attn"), 100)
    published = make_blueprint(dict(zip(sizes, (3.0, 1.0, 5.0, 2.0, 4.0), strict=True)), sizes)
    found = shares(select(published, groups={"attn": ["h.0.attn", "h.1.attn"]}, unit="layer", budget=1.0))
    q, k, first, second, attn = found
    assert q == k == attn
    assert first == second
    assert q / first == pytest.approx(((9 + 1 + 16) / 3) ** 0.5 / ((25 + 4) / 2) ** 0.5, abs=1e-5)
    groups: Mapping[str, tuple[str, ...]]
    for groups in ({}, {"attn": ("h.7.attn",)}):
        with pytest.raises(ConfigurationError, match="groups name no layer"):
            select(published, staleness=checked(Verdict.STALE, groups=groups))


# --- ranked or drawn


def test_at_temperature_2_chances_grow_with_the_root_of_the_score() -> None:
    blueprint = make_blueprint({"w": 1.0}, sizes={"w": 200_000})
    gradient = torch.ones(200, 1000)
    gradient[:100] = 16  # four times the chance at temperature 2
    chosen = select(blueprint, budget=0.01, gradients={"w": gradient}, temperature=2.0).parts["w"]
    assert len(chosen) == 2000
    high = int((chosen < 100_000).sum())
    assert abs(high - 1600) < 4 * (2000 * 0.8 * 0.2) ** 0.5


def test_by_default_the_largest_scores_are_taken() -> None:
    blueprint = make_blueprint({"w": 1.0}, sizes={"w": 20_000})
    gradients = {"w": torch.randn(100, 200)}
    largest = gradients["w"].abs().flatten().topk(2000).indices.sort().values
    selection = select(blueprint, budget=0.1, gradients=gradients)
    assert selection.parts["w"].tolist() == largest.tolist()
    assert selection.score == "empirical_bayes"


def test_temperature_leads_from_the_largest_scores_to_chance() -> None:
    blueprint = make_blueprint({"w": 1.0}, sizes={"w": 20_000})
    gradients = {"w": torch.randn(100, 200).exp()}
    largest = gradients["w"].flatten().topk(2000).indices.numpy()

    def common(temperature: float) -> int:
        chosen = select(blueprint, budget=0.1, gradients=gradients, temperature=temperature).parts["w"]
        return len(np.intersect1d(chosen, largest))

    assert common(0.0) == 2000 > common(0.5) > common(2.0) > common(100.0)
    assert abs(common(1e6) - 200) < 60


def test_what_was_never_seen_to_move_is_drawn_last() -> None:
    blueprint = make_blueprint({"w": 1.0}, sizes={"w": 1000})
    gradient = torch.zeros(10, 100)
    gradient[4] = torch.rand(100) + 0.1
    chosen = select(blueprint, budget=0.1, gradients={"w": gradient}).parts["w"]
    assert chosen.tolist() == list(range(400, 500))


def test_a_temperature_below_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a temperature is 0"):
        select(PUBLISHED, temperature=-1.0)


# --- units and criteria


def test_rows_are_chosen_whole_and_by_their_mean_square() -> None:
    gradients = gradients_of()
    gradients["a.weight"][[3, 7]] *= 10
    selection = select(PUBLISHED, budget=0.1, unit="row", gradients=gradients)
    assert selection.parts["a.weight"].tolist() == [3, 7]
    assert selection.indices("a.weight", (20, 50)).tolist() == [*range(150, 200), *range(350, 400)]  # type: ignore[union-attr]  # a tenth
    with pytest.raises(ConfigurationError, match="needs the tensor's shape"):
        selection.indices("a.weight", 1000)


def test_a_row_of_a_stack_of_matrices_is_a_row_of_one_of_them() -> None:
    assert width_of("row", (8, 20, 50)) == 50
    assert width_of("row", (20, 50, 3, 3)) == 450, "a filter holds all its places"
    assert (width_of("row", (20,)), width_of("coordinate", (8, 20, 50))) == (1, 1)
    experts = torch.rand(8, 20, 50)
    experts[5, 7] *= 10
    blueprint = make_blueprint({"experts": 1.0}, {"experts": 8000})
    selection = select(blueprint, budget=50 / 8000, unit="row", gradients={"experts": experts})
    assert selection.indices("experts", (8, 20, 50)).tolist() == list(range(5350, 5400))  # type: ignore[union-attr]  # not all


def test_rows_that_do_not_fit_are_not_counted_and_the_summary_names_their_layers() -> None:
    selection = select(PUBLISHED, budget=0.025, unit="row", gradients=gradients_of())
    assert [layer.selected for layer in selection.layers] == [0, 20, 0]
    assert selection.training_bytes == 20 * BYTES_PER_DENSE_PARAMETER
    assert "frozen, since their fraction is less than one row: 2 layers (a…)" in selection.summary()


def test_rows_of_an_unknown_tensor_are_random_and_always_the_same() -> None:
    first, again = (select(PUBLISHED, budget=0.1, unit="row").units("a.weight", (20, 50)) for _ in range(2))
    assert first.width == 50
    assert first.indices is not None
    assert again.indices is not None
    assert len(first.indices) == 2
    assert np.array_equal(first.indices, again.indices)


def test_rows_survive_their_file(tmp_path: Path) -> None:
    selection = select(PUBLISHED, budget=0.1, unit="row", gradients=gradients_of())
    again = Selection.load(selection.save(tmp_path / "selection"))
    for name, gradient in gradients_of().items():
        assert np.array_equal(
            again.indices(name, tuple(gradient.shape)),  # type: ignore[arg-type]  # a tenth, not all
            selection.indices(name, tuple(gradient.shape)),  # type: ignore[arg-type]  # likewise
        )


def test_criteria_say_what_a_layer_is_worth() -> None:
    blueprint = make_blueprint(
        {"a": 3.0, "b": 1.0, "c": 1.0},
        {"a": 900, "b": 100, "c": 100},
        signal={"a": 1.0, "b": 1.0, "c": 2.0},
        first_order={"a": -5.0, "b": 3.0, "c": 1.0},
    )

    def by(criterion: Any) -> list[float]:
        return shares(select(blueprint, unit="layer", criterion=criterion))

    assert by("norm") == [0.6, 0.2, 0.2]
    assert by("signal") == [0.25, 0.25, 0.5]
    assert by("first_order") == [0, 0.75, 0.25]
    assert by("size_normalised") == [round(1 / 3, 6)] * 3
    assert by(lambda layer: float(layer.id == "b")) == [0, 1, 0]
    with pytest.raises(ConfigurationError, match="does not hold"):
        select(PUBLISHED, unit="layer", criterion="signal")


def test_the_absolute_criterion_sums_the_magnitudes_of_factors_and_gradients() -> None:
    gradients = {name: torch.full_like(gradient, 2.0) for name, gradient in gradients_of().items()}
    assert shares(select(PUBLISHED, unit="layer", criterion="absolute", gradients=gradients)) == [
        round(size / 2200, 6) for size in SIZES.values()
    ]
    factors = {
        f"code/{name}.weight/{side}": torch.ones(n)
        for name, shape in (("a", (20, 50)), ("b", (50, 20)), ("c", (10, 20)))
        for side, n in zip(("row", "column"), shape, strict=True)
    }
    assert shares(select(PUBLISHED, unit="layer", criterion="absolute", factors=factors))[0] == round(1000 / 2200, 6)
    with pytest.raises(ConfigurationError, match="give either"):
        select(PUBLISHED, unit="layer", criterion="absolute")
    with pytest.raises(ConfigurationError, match="local gradients lack b, c"):
        select(PUBLISHED, unit="layer", criterion="absolute", gradients={"a.weight": gradients["a.weight"]})


@pytest.mark.parametrize("published", [{}, {"trust": 0.0}, {"staleness": Verdict.STALE}])
@pytest.mark.parametrize("with_factors", [False, True])
def test_local_gradients_alone_decide_the_absolute_criterion_where_the_published_side_has_no_say(
    published: dict[str, Any], with_factors: bool
) -> None:
    given: dict[str, Any] = {name: checked(v) if name == "staleness" else v for name, v in published.items()}
    gradients = {name: torch.full_like(each, 10.0 if name[0] == "b" else 0.1) for name, each in gradients_of().items()}
    if with_factors:
        given["factors"] = {
            f"code/{name}/{side}": torch.ones(n)
            for name, each in gradients.items()
            for side, n in zip(("row", "column"), each.shape, strict=True)
        }
    selection = select(PUBLISHED, unit="layer", criterion="absolute", gradients=gradients, **given)
    alone = bool(published) or not with_factors
    assert (shares(selection)[1] > 0.95) == alone
    assert (selection.trust == 0) == alone


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_criterion_that_is_no_size_is_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"the criterion gives .* for 'b'"):
        select(PUBLISHED, unit="layer", criterion=lambda layer: value if layer.id == "b" else 1.0)


def test_a_file_that_is_no_selection_is_named(tmp_path: Path) -> None:
    file = select(PUBLISHED, seed=3).save(tmp_path / "selection.safetensors")
    whole = file.read_bytes()
    for content in (b"hello world, no safetensors", whole[:-40], whole.replace(b"copies", b"copied")):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"selection\.safetensors holds no whole selection"):
            Selection.load(file)


def test_numbers_of_numpy_and_torch_are_taken_and_saved(tmp_path: Path) -> None:
    selection = select(PUBLISHED, criterion=lambda layer: torch.tensor(2.5), seed=np.int64(3))  # type: ignore[arg-type, return-value]
    assert Selection.load(selection.save(tmp_path / "selection.safetensors")).layers == selection.layers
    assert shares(selection) == [round(1 / 3, 6)] * 3


def test_scores_below_zero_are_refused_and_tensors_taken() -> None:
    gradients = gradients_of()

    def score(name: str, shape: tuple[int, ...]) -> Any:
        return gradients[name].abs()

    given = {"gradients": gradients, "budget": 0.1}
    expected = select(PUBLISHED, **given).parts  # type: ignore[arg-type]
    found = select(PUBLISHED, score=score, **given).parts  # type: ignore[arg-type]
    assert all(np.array_equal(found[name], parts) for name, parts in expected.items())
    with pytest.raises(ConfigurationError, match=r"a.weight has negative values, down to -"):
        select(PUBLISHED, score=lambda name, shape: -score(name, shape), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [{"gradients": {}}, {"statistics": LocalStatistics(row={"a.weight": torch.ones(20)})}]
)
def test_a_sample_that_says_nothing_of_the_score_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="knows no tensor"):
        select(PUBLISHED, **given)


# --- how far either side is believed


def checked(verdict: Verdict, **fields: Any) -> Staleness:
    digest = "sha256:" + "0" * 64
    return Staleness.model_validate(
        {
            "model_id": "m",
            "training_checkpoint": 1.0,
            "version": 1,
            "lab": "lab",
            "digest": digest,
            "other_digest": digest,
            "statistic": "gradient_norm",
            "domain": "code",
            "verdict": verdict,
            "advice": "use",
            "threshold": 0.95,
            "levels": [],
            "top": 1,
            "matched": 3,
            "method_version": 1,
        }
        | fields
    )


FACTORS = {"code/a.weight/row": torch.rand(20), "code/a.weight/column": torch.rand(50)}


def test_a_stale_blueprint_has_no_say_and_without_a_local_sample_chance_decides() -> None:
    stale = select(PUBLISHED, budget=0.1, factors=FACTORS, staleness=checked(Verdict.STALE))
    assert stale.trust == stale.validity == 0
    assert shares(stale) == [round(size / 2200, 6) for size in SIZES.values()]
    by_chance = select(PUBLISHED, budget=0.1).indices("a.weight", 1000)
    assert np.array_equal(stale.indices("a.weight", 1000), by_chance)  # type: ignore[arg-type]  # a tenth, not all
    fresh = select(PUBLISHED, budget=0.1, factors=FACTORS, staleness=checked(Verdict.FRESH))
    assert np.array_equal(fresh.parts["a.weight"], select(PUBLISHED, budget=0.1, factors=FACTORS).parts["a.weight"])


def test_k_stars_of_a_stale_blueprint_have_no_say_beside_a_local_side_without_any() -> None:
    norms, sizes = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 1000)
    published = make_blueprint(norms, sizes, k_star=dict(zip("abcd", (0.05, 0.2, 0.8, 0.05), strict=True)))

    def fractions(trust: float, **local_k_star: float) -> list[float]:
        local = make_blueprint(norms, k_star=local_k_star)
        return [layer.fraction for layer in select(published, local, trust=trust).layers]

    assert fractions(0.0) == pytest.approx([0.1] * 4)
    alone = [layer.fraction for layer in select(published).layers]
    assert fractions(1.0) == pytest.approx(alone)
    assert fractions(0.5) == pytest.approx([layer.fraction for layer in select(published, trust=0.5).layers])
    known_of_two = fractions(0.0, a=0.1, b=0.3)
    assert known_of_two == pytest.approx([0.05, 0.15, 0.1, 0.1]), "what the local side lacks is its mean"


def test_trust_does_not_bring_back_what_is_stale() -> None:
    stale = checked(Verdict.STALE)
    selection = select(PUBLISHED, budget=0.1, factors=FACTORS, staleness=stale, trust=0.8)
    assert selection.trust == selection.validity == 0
    assert not selection.parts
    half = select(PUBLISHED, factors=FACTORS, staleness=checked(Verdict.INDETERMINATE), trust=0.8)
    assert (half.trust, half.validity) == (0.4, 0.5)


@pytest.mark.parametrize("trust", [1.0, 0.5, 0.0])
def test_the_side_that_is_alone_decides_whatever_its_trust(trust: float) -> None:
    alone = select(PUBLISHED, budget=0.1, factors=FACTORS).parts["a.weight"]
    assert np.array_equal(select(PUBLISHED, budget=0.1, factors=FACTORS, trust=trust).parts["a.weight"], alone)
    local = select(PUBLISHED, budget=0.1, gradients=gradients_of()).parts["a.weight"]
    believed = select(PUBLISHED, budget=0.1, gradients=gradients_of(), trust=trust).parts["a.weight"]
    assert np.array_equal(believed, local)


def test_a_coarser_level_that_holds_keeps_its_say_between_its_groups() -> None:
    groups = {"early": ("a", "c"), "late": ("b",)}
    coarse = select(PUBLISHED, staleness=checked(Verdict.STALE, groups=groups))
    assert coarse.trust == 1
    assert shares(coarse) == shares(select(PUBLISHED, groups=groups))


@pytest.mark.parametrize("sequences", [2, 8, 128])
def test_a_small_sample_decides_alone_where_the_published_side_is_stale(sequences: int) -> None:
    """Random coordinates beside ranked ones would need another learning rate."""
    statistics = LocalStatistics(mean=gradients_of(), batches=1, sequences=sequences)
    stale = checked(Verdict.STALE)
    chosen = select(PUBLISHED, budget=0.1, factors=FACTORS, statistics=statistics, staleness=stale).parts["a.weight"]
    largest = select(PUBLISHED, budget=0.1, gradients=gradients_of()).parts["a.weight"]
    assert np.array_equal(chosen, largest)


def test_a_share_of_the_budget_is_random_on_request() -> None:
    gradients = gradients_of()
    chosen = select(PUBLISHED, budget=0.1, gradients=gradients, random_share=0.3).parts["a.weight"]
    largest = select(PUBLISHED, budget=0.1, gradients=gradients).parts["a.weight"]
    assert len(chosen) == len(np.unique(chosen)) == 100
    assert len(np.intersect1d(chosen, largest)) in range(70, 80)


# --- device


def test_a_budget_fits_the_device_less_what_a_step_holds() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 10))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return model(inputs)  # type: ignore[no-any-return]  # a module is untyped

    inputs = torch.randn(8, 100)
    # saved: the inputs (8 x 100) and the output of Tanh (8 x 50), float32; the largest again; the largest gradient
    held = (800 + 400) * 4 + 800 * 4 + 5000 * 4
    budget = Budget.device(Wrapped(), {"inputs": inputs}, free=100_000, reserve=0.1)
    assert (budget.measure, budget.amount) == ("bytes", 90_000 - held)
    with pytest.raises(ConfigurationError, match="nothing is left"):
        Budget.device(Wrapped(), {"inputs": inputs}, free=held)
    assert Budget.device(Wrapped(), {"inputs": inputs}).amount > 0


def test_weights_of_lower_precision_cost_a_copy() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10)}).bfloat16()
    selection = select(make_blueprint({"a": 1.0}), budget=Budget.bytes(20 * 20), model=model)
    assert (selection.selected, selection.training_bytes) == (19, 380)  # of 20: 18 weights and 1 bias


def test_bytes_that_pay_for_a_full_update_buy_every_coordinate() -> None:
    full = select(PUBLISHED, budget=Budget.bytes(2200 * BYTES_PER_DENSE_PARAMETER))
    assert [layer.fraction for layer in full.layers] == [1, 1, 1]
    assert full.training_bytes == full.full_bytes
    less = select(PUBLISHED, budget=Budget.bytes(2200 * BYTES_PER_DENSE_PARAMETER - 1))
    assert less.selected <= 2200 * BYTES_PER_DENSE_PARAMETER / BYTES_PER_COORDINATE


# --- what cannot be meant


@pytest.mark.parametrize(
    ("budget", "unit", "least"),
    [
        (0.0005, "coordinate", Budget.parameters(3)),
        (Budget.bytes(15), "coordinate", Budget.bytes(48)),
        (0.01, "row", Budget.parameters(44)),
        (0.05, "layer", Budget.parameters(200)),
    ],
)
def test_a_budget_that_pays_for_nothing_is_refused_with_the_least_that_does(
    budget: float | Budget, unit: Unit, least: Budget
) -> None:
    told = rf"Budget\.{least.measure}\({least.amount}\)$"
    with pytest.raises(ConfigurationError, match=rf"for one {unit} anywhere, .* {told}"):
        select(PUBLISHED, budget=budget, unit=unit, gradients=gradients_of())
    assert select(PUBLISHED, budget=least, unit=unit, gradients=gradients_of()).selected > 0
    with pytest.raises(ConfigurationError, match="the least"):
        select(PUBLISHED, budget=replace(least, amount=least.amount - 1), unit=unit, gradients=gradients_of())


def test_options_that_mean_nothing_are_refused() -> None:
    options: dict[str, Any]
    for options, message in (
        ({"random_share": 1.5}, "random_share is a share"),
        ({"random_share": -0.5}, "random_share is a share"),
        ({"criterion": "snr"}, "there is no criterion 'snr': norm, signal"),
        ({"budget": "10%"}, "a budget is a number"),
        ({"also_train": ["head"]}, "pass model="),
    ):
        with pytest.raises(ConfigurationError, match=message):
            select(PUBLISHED, **options)


@pytest.mark.parametrize("score", ["empirical_bayes", "blend", "factors", "mean_gradient", "rms", "local_factors"])
def test_a_score_asked_for_by_name_has_to_know_something(score: ScoreName) -> None:
    with pytest.raises(ConfigurationError, match=f"the score '{score}' knows no tensor"):
        select(PUBLISHED, score=score)
    assert select(PUBLISHED, score="random").parts == {}


def test_factors_and_gradients_of_other_tensors_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the factors know no tensor.*x\.y"):
        select(PUBLISHED, factors={"code/x.y/row": torch.ones(4)})
    with pytest.raises(ConfigurationError, match=r"the local statistics know no tensor.*x\.y"):
        select(PUBLISHED, gradients={"x.y": torch.ones(4)})
    with pytest.raises(ConfigurationError, match="pass model="):
        select(PUBLISHED, score=lambda name, shape: None)


def test_a_local_blueprint_by_other_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no layer of the published one"):
        select(PUBLISHED, make_blueprint({"a.weight": 1.0}))


def test_the_summary_counts_what_was_ranked_and_what_is_random() -> None:
    model = nn.ModuleDict({"a": nn.Linear(50, 20), "b": nn.Linear(20, 50)})
    blueprint = make_blueprint({"a": 1.0, "b": 1.0})
    gradients = {"a.weight": torch.rand(20, 50)}
    text = select(blueprint, gradients=gradients, model=model).summary()
    assert "empirical_bayes (tensors ranked: 1, at random: 3)" in text
    assert "(tensors ranked: 0, at random: the others)" in select(PUBLISHED).summary()


def test_what_is_kept_is_a_share_of_the_mass_of_all_tensors_of_a_layer() -> None:
    blueprint = make_blueprint({"h": 1.0}, {"h": 2000})
    peaked, flat = torch.zeros(1000), torch.ones(1000)
    peaked[3] = 1e-6
    layer = select(blueprint, budget=0.1, gradients={"h.a": peaked, "h.b": flat}).layers[0]
    assert layer.retained == pytest.approx(0.1, abs=1e-3)
