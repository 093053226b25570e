"""The table of layers × examples: structure beside nulls, co-selection, the paper's exponents."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.cross_influence import (
    Spectrum,
    block_table,
    co_select,
    double_centred,
    pooled,
    predicted_share,
    rank_size_exponent,
    structure,
)
from gradient_blueprints.training.profiling import GradientProfiler
from tests.training.profiling.small_models import VOCABULARY, llama


def product_table(layers: int = 40, examples: int = 30, noise: float = 0.3, seed: int = 0) -> npt.NDArray[np.float64]:
    """Large layers, loud examples, independent noise: no interaction."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(size=(layers, 1)) + rng.normal(size=(1, examples)) + noise * rng.normal(size=(layers, examples))
    return np.exp(logs)


def test_a_table_without_interaction_looks_low_rank_and_is_found_to_have_no_modes() -> None:
    found = structure(product_table())
    assert found.raw.rank_one > 0.8
    assert found.modes == 0
    assert found.centred.effective_rank == pytest.approx(found.shuffled.effective_rank, rel=0.05)


def test_rounding_errors_of_a_product_are_no_interaction() -> None:
    rng = np.random.default_rng(1)
    for scale in (1.0, 1e-6):
        found = structure(np.exp(scale * rng.normal(size=(20, 1))) * np.exp(scale * rng.normal(size=(1, 30))))
        assert (found.modes, found.interaction, found.centred.effective_rank) == (0, 0, 1)


def test_one_planted_interaction_is_one_mode() -> None:
    table = product_table()
    table[:20, :15] *= 1.8
    table[20:, 15:] *= 1.8
    found = structure(table)
    assert found.modes == 1
    assert found.centred.rank_one > 2 * found.shuffled.rank_one
    assert found.centred.values[0] > found.shuffled_largest


def test_half_normal_entries_put_two_over_pi_into_the_first_singular_value() -> None:
    found = structure(np.abs(np.random.default_rng(1).standard_normal((273, 48))))
    assert found.half_normal == pytest.approx(2 / np.pi, abs=0.01)
    assert found.raw.rank_one == pytest.approx(found.half_normal, abs=0.01)
    assert found.half_normal_centred.rank_one == pytest.approx(found.centred.rank_one, rel=0.15)


def test_an_additive_table_is_explained_by_its_means() -> None:
    table = np.arange(1.0, 6)[:, None] + np.arange(1.0, 9)[None]
    assert structure(table).additive == pytest.approx(1)
    assert np.abs(double_centred(table)).max() < 1e-12


def test_effective_rank_counts_equal_singular_values() -> None:
    assert Spectrum.of(np.eye(7)).effective_rank == pytest.approx(7)
    assert Spectrum.of(np.ones((3, 5))).effective_rank == pytest.approx(1)


def test_layers_with_a_zero_are_left_out_of_the_structure() -> None:
    table = product_table()
    table[3, 5] = 0
    table[:, 7] = 0
    found = structure(table)
    assert (found.layers, found.examples) == (39, 29)


def test_the_structure_is_the_same_at_every_call_and_prints_both_nulls() -> None:
    first, second = structure(product_table()), structure(product_table())
    assert str(first) == str(second)
    assert "half-normal" in str(first)
    assert "shuffled" in str(first)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 6), st.sampled_from([0.3, 0.5, 0.8]))
def test_co_selection_is_a_pair_that_neither_side_can_better(seed: int, layers: int, examples: int, q: float) -> None:
    rng = np.random.default_rng(seed)
    table, sizes = rng.exponential(size=(layers, examples)), rng.integers(1, 5, layers).tolist()
    if int(q * examples) == 0:
        return
    found = co_select(table, 0.6, q, sizes)
    capacity, count = 0.6 * sum(sizes), int(q * examples)
    shares = {
        (s, d): table[np.ix_(s, d)].sum() / table.sum()
        for r in range(1, layers + 1)
        for s in itertools.combinations(range(layers), r)
        if sum(sizes[i] for i in s) <= capacity + 1e-9
        for d in itertools.combinations(range(examples), count)
    }
    chosen = tuple(found.layers.tolist()), tuple(found.examples.tolist())
    if not shares:
        assert found.share == 0
        return
    best = max(shares.values())
    assert found.share == pytest.approx(shares[chosen])
    assert found.share >= 0.97 * best
    assert best <= found.bound + 1e-12
    assert all(share <= found.share + 1e-12 for (s, d), share in shares.items() if s == chosen[0] or d == chosen[1])


def test_choosing_together_beats_choosing_apart_where_layers_and_examples_interact() -> None:
    table = np.full((10, 10), 0.1)
    table[:5, :5] = 1.0  # the best pair
    table[5:, 5:] = 0.9
    found = co_select(table, 0.5, 0.5)
    assert found.layers.tolist() == found.examples.tolist() == [0, 1, 2, 3, 4]
    assert found.share > 1.5 * found.independent


def test_a_budget_in_parameters_is_kept() -> None:
    found = co_select(np.ones((3, 4)), 0.5, 1.0, sizes=[100, 40, 40])
    assert found.layers.tolist() == [1, 2]
    assert found.k == pytest.approx(80 / 180)


@pytest.mark.parametrize(("k", "q"), [(0, 0.5), (0.5, 1.2), (0.5, 0.01)])
def test_impossible_budgets_are_refused(k: float, q: float) -> None:
    with pytest.raises(ConfigurationError):
        co_select(np.ones((3, 4)), k, q)


def test_a_share_that_pays_for_no_layer_is_refused_with_the_smallest() -> None:
    with pytest.raises(ConfigurationError, match=r"pays for 18 of 180 parameters.* smallest layer has 40: raise k"):
        co_select(np.ones((3, 4)), 0.1, 1.0, sizes=[100, 40, 40])


def test_the_tail_exponent_of_a_power_law_is_found() -> None:
    influences = np.arange(1, 20_001, dtype=np.float64) ** -0.7
    assert rank_size_exponent(np.random.default_rng(0).permutation(influences)) == pytest.approx(0.7, abs=0.01)
    normal = np.abs(np.random.default_rng(0).standard_normal(100_000))
    assert rank_size_exponent(normal) == pytest.approx(0.33, abs=0.02)


def test_the_predicted_share_is_a_product_and_one_for_everything() -> None:
    assert predicted_share(1, 1, 0.5, 0.3) == 1
    assert predicted_share(0.2, 1, 0.5, 0.3) == pytest.approx(0.2 ** (1 / 1.5))
    assert predicted_share(0.2, 0.3, 0.5, 0.3) == pytest.approx(0.2 ** (1 / 1.5) * 0.3 ** (1 / 1.3))


def test_blocks_are_the_norms_of_batch_gradients_and_pooled_examples_bound_them() -> None:
    torch.manual_seed(0)
    model = llama()
    batches = [{"input_ids": torch.randint(VOCABULARY, (3, 7))} for _ in range(2)]
    with GradientProfiler(model, statistics="batches") as profiler:
        for batch in batches:
            profiler.step(batch)
    blocks = block_table(profiler)
    model.zero_grad()
    model(**batches[1], labels=batches[1]["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    wanted = [
        float(torch.cat([gradients[name].flatten() for name in layer.parameters]).norm()) for layer in profiler.layers
    ]
    assert blocks[:, 1] == pytest.approx(wanted, rel=1e-4)
    assert (blocks <= pooled(profiler.table(), [0, 0, 0, 1, 1, 1]) * (1 + 1e-6)).all()


def test_chosen_examples_are_positions_in_the_stream_whatever_has_no_target() -> None:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (8, 7))
    labels = ids.clone()
    labels[[0, 2, 3, 5]] = -100  # alone, a whole batch, and within a batch
    with GradientProfiler(llama(), statistics="examples") as profiler:
        for rows in ([0, 1], [2, 3], [4, 5, 6, 7]):
            profiler.step({"input_ids": ids[rows], "labels": labels[rows]})
    table = profiler.table()
    assert np.flatnonzero(table.sum(0) > 0).tolist() == [1, 4, 6, 7]
    assert np.flatnonzero(profiler.influences() == 0).tolist() == [0, 2, 3, 5]
    assert co_select(table, 1.0, 0.5).examples.tolist() == [1, 4, 6, 7]


def test_blocks_need_the_norms_of_batches() -> None:
    with GradientProfiler(llama(), statistics="examples") as profiler:
        profiler.step({"input_ids": torch.randint(VOCABULARY, (2, 5))})
    with pytest.raises(ConfigurationError, match="batches"):
        block_table(profiler)


def test_a_table_with_negative_or_non_finite_entries_is_refused() -> None:
    for bad in (np.array([[1.0, -1.0]]), np.array([[1.0, np.nan]]), np.ones(3)):
        with pytest.raises(ConfigurationError, match="layers × examples"):
            structure(bad)
    with pytest.raises(ConfigurationError, match="labels"):
        pooled(np.ones((2, 3)), [0, 1])
