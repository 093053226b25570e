"""What a private blueprint reveals: noise of the stated scale over bounded sums, and not one number beside them."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kstest, norm
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Provenance
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.privacy import GRID, Privacy
from tests.training.profiling.small_models import Batch, batch, build

PRIVACY = Privacy(clip=3.0, epsilon=1.0, delta=1e-6)
vectors = arrays(np.float64, (5, 4), elements=st.floats(0, 1e3))


def length(steps: np.ndarray[Any, Any]) -> float:
    return math.sqrt(sum(int(value) ** 2 for value in steps))


# --- sensitivity


@settings(max_examples=200, deadline=None)
@given(vectors, arrays(np.float64, (1, 4), elements=st.floats(0, 1e300) | st.just(np.inf) | st.just(np.nan)))
def test_sums_of_neighbours_differ_by_at_most_the_sensitivity(
    norms: np.ndarray[Any, Any], other: np.ndarray[Any, Any]
) -> None:
    steps = PRIVACY.clipped(norms)
    assert all(length(row) <= GRID for row in steps)
    replaced = PRIVACY.clipped(np.concatenate([other, norms[1:]]))
    assert length(steps.sum(0) - replaced.sum(0)) <= math.sqrt(2) * GRID <= PRIVACY.sensitivity


def test_the_sensitivity_is_reached_and_two_rows_of_a_document_double_it() -> None:
    one, two = PRIVACY.clipped(np.array([[9.0, 0.0]])), PRIVACY.clipped(np.array([[0.0, 9.0]]))
    assert length(one[0] - two[0]) == pytest.approx(PRIVACY.sensitivity, rel=1e-8)
    assert Privacy(3.0, 1.0, 1e-6, rows_per_document=2).sensitivity == 2 * PRIVACY.sensitivity


def test_norms_within_the_clip_keep_their_size() -> None:
    norms = np.array([[0.5, 1.0, 2.0], [30.0, 40.0, 0.0]])
    np.testing.assert_allclose(PRIVACY.clipped(norms)[0] * 3.0 / GRID, norms[0], rtol=1e-8)
    np.testing.assert_allclose(PRIVACY.clipped(norms)[1] * 3.0 / GRID, norms[1] * 3 / 50, rtol=1e-8)


# --- noise


def test_the_noise_is_gaussian_and_has_the_stated_scale() -> None:
    examples, layers = 7, 20_000
    centre = 3.0 / math.sqrt(layers)
    draws = []
    for _ in range(2):
        noised = PRIVACY.noised_mean(np.full((examples, layers), centre))
        draws.append((noised - centre) / PRIVACY.sigma(examples))
    clipped_at_zero = -centre / PRIVACY.sigma(examples)
    for drawn in draws:
        kept = drawn[drawn > clipped_at_zero + 1e-9]
        # half of a Gaussian about zero: its positive part is |N(0, 1)|
        assert kstest(kept[kept > 0], lambda x: 2 * norm.cdf(x) - 1).pvalue > 1e-4
        assert np.sqrt((kept[kept > 0] ** 2).mean()) == pytest.approx(1, abs=4 / math.sqrt(layers))
    assert not np.allclose(draws[0], draws[1])


def test_the_noise_does_not_follow_any_seed() -> None:
    norms = np.ones((4, 3))
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(PRIVACY.noised_mean(norms))
    assert not np.array_equal(drawn[0], drawn[1])


# --- accounting


def analytic_delta(epsilon: float, multiplier: float) -> float:
    """Balle and Wang 2018, theorem 8: the least delta of Gaussian noise of `multiplier` times the sensitivity."""
    half = 1 / (2 * multiplier)
    return float(norm.cdf(half - epsilon * multiplier) - math.exp(epsilon) * norm.cdf(-half - epsilon * multiplier))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-6), (1.0, 1e-6), (8.0, 1e-5)])
def test_the_noise_keeps_the_budget_by_the_analytic_formula_without_waste(epsilon: float, delta: float) -> None:
    budget = Privacy(1.0, epsilon, delta)
    multiplier = budget.scale / budget.sensitivity
    assert analytic_delta(epsilon, multiplier) <= delta
    assert analytic_delta(epsilon, 0.9 * multiplier) > delta  # zCDP costs up to a tenth more noise


def test_releases_share_the_budget() -> None:
    four = Privacy(3.0, 1.0, 1e-6, releases=4)
    assert four.scale == pytest.approx(2 * PRIVACY.scale, rel=1e-6)  # four Gaussians are one of half the noise


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"epsilon": 0}, {"delta": 1}, {"releases": 0}])
def test_budgets_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Privacy(**({"clip": 1.0, "epsilon": 1.0, "delta": 1e-6} | wrong))


# --- the document


def profile(model: nn.Module, seeds: tuple[int, int], **options: Any) -> GradientProfiler:
    with GradientProfiler(model, privacy=PRIVACY, **options) as profiler:
        profiler.step(batch(6, seed=seeds[0]))
        profiler.step(batch(2, seed=seeds[1]), domain="bio")
    return profiler


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for inner in value for k, v in leaves(inner, f"{path}/*").items()}
    return {path: value}


def test_the_document_holds_public_facts_and_noised_norms_and_nothing_else() -> None:
    model = build("llama")
    blueprint = profile(model, (1, 2)).blueprint("tiny", 0.5, Provenance(notes="a test"))
    assert leaves(json.loads(blueprint.to_json())).keys() == {
        # named by the lab, or facts of the model and the machine
        "/schema_version",
        "/model_id",
        "/training_checkpoint",
        "/statistic",
        "/cost_model/fixed",
        "/cost_model/variable",
        "/layers/*/id",
        "/layers/*/parameters",
        "/layers/*/kind",
        "/layers/*/depth",
        "/provenance/profiler",
        "/provenance/weights_digest",
        "/provenance/seed",
        "/provenance/dtype",
        "/provenance/device",
        "/provenance/versions/python",
        "/provenance/versions/torch",
        "/provenance/versions/transformers",
        "/provenance/notes",
        # the number of rows, which neighbours share, and what follows from it and the budget
        "/provenance/batches",
        "/provenance/batch_size",
        "/provenance/examples",
        "/provenance/noise/mechanism",
        "/provenance/noise/sigma",
        "/provenance/noise/clip",
        "/provenance/noise/epsilon",
        "/provenance/noise/delta",
        "/extra/profile/general",
        "/extra/profile/privacy/neighbours",
        "/extra/profile/privacy/rows_per_document",
        "/extra/profile/privacy/releases",
        "/extra/profile/privacy/domains/general/examples",
        "/extra/profile/privacy/domains/general/sigma",
        "/extra/profile/privacy/domains/bio/examples",
        "/extra/profile/privacy/domains/bio/sigma",
        # noised
        "/layers/*/gradient_norm",
        "/layers/*/example_norm",
        "/layers/*/domain_norms/general",
        "/layers/*/domain_norms/bio",
    }
    assert blueprint.provenance is not None
    assert blueprint.provenance.noise is not None
    assert blueprint.provenance.noise.sigma == pytest.approx(PRIVACY.sigma(6), rel=1e-5)


def test_but_for_the_noised_norms_the_document_does_not_depend_on_the_data() -> None:
    model = build("llama")
    plain: list[dict[str, Any]] = []
    for seeds in ((1, 2), (3, 4)):
        document = json.loads(profile(model, seeds).blueprint("tiny", 0.5).to_json())
        for layer in document["layers"]:
            for name in ("gradient_norm", "example_norm", "domain_norms"):
                del layer[name]
        plain.append(document)
    assert plain[0] == plain[1]


def test_with_a_generous_budget_the_norms_are_those_of_the_examples() -> None:
    model = build("llama")
    with GradientProfiler(model, privacy=Privacy(clip=50, epsilon=100, delta=0.9)) as private:
        private.run([batch(24, seed=1)])
    with GradientProfiler(model) as open_profiler:
        open_profiler.run([batch(24, seed=1)])
    found = private.blueprint("tiny", 0.5)
    sigma = Privacy(clip=50, epsilon=100, delta=0.9).sigma(24)
    for layer, expected in zip(found.layers, open_profiler.blueprint("tiny", 0.5).layers, strict=True):
        assert layer.example_norm == pytest.approx(expected.example_norm, abs=6 * sigma)


def test_an_example_without_a_finite_gradient_counts_as_zero_and_leaves_the_others_alone() -> None:
    """Else the number of examples, or a whole batch, would tell of one."""

    def loss(outputs: Any, values: Any) -> torch.Tensor:
        flat = outputs.logits.flatten(1)[:, :5].sum(1)
        return torch.where(values["input_ids"][:, 0] == 7, flat * float("nan"), flat)

    model, values = build("llama"), batch(3, padded=False)
    tables = []
    for broken in (False, True):
        ids = values["input_ids"].clone()
        ids[:, 0] = 5
        ids[1, 0] = 7 if broken else 5
        given: Batch = {"input_ids": ids, "attention_mask": values["attention_mask"]}
        with GradientProfiler(model, privacy=PRIVACY, loss=loss) as profiler:
            profiler.step(given)
        tables.append(PRIVACY.clipped(profiler.table().T))
        assert profiler.domain().examples == 3
    assert (tables[1][1] == 0).all()
    assert (tables[0][[0, 2]] == tables[1][[0, 2]]).all()


def test_the_noise_is_drawn_once_and_nothing_more_is_measured_after() -> None:
    with GradientProfiler(build("llama"), privacy=PRIVACY) as profiler:
        profiler.step(batch())
        first = profiler.blueprint("tiny", 0.5)
        assert profiler.blueprint("tiny", 0.5) == first
        with pytest.raises(ConfigurationError, match="new budget"):
            profiler.step(batch(seed=2))


def test_what_would_tell_more_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ConfigurationError, match="until"):
        GradientProfiler(model, privacy=PRIVACY, until=0.2)
    with pytest.raises(ConfigurationError, match="mean"):
        GradientProfiler(model, privacy=PRIVACY, statistic="median")
    with pytest.raises(ConfigurationError, match="eval"), GradientProfiler(build("gpt2").train(), privacy=PRIVACY):
        pass
    partly = build("gpt2")
    partly.get_submodule("transformer.drop").train()
    with pytest.raises(ConfigurationError, match="eval"), GradientProfiler(partly, privacy=PRIVACY):
        pass
    profiler = profile(model, (1, 2), statistics="all")
    assert not profiler.has_factors
    with pytest.raises(ConfigurationError, match="no factors"):
        profiler.factors()
    with pytest.raises(ConfigurationError, match="not data, loss"):
        profiler.blueprint("tiny", 0.5, Provenance(loss={"general": 1.0}, data={"general": {"digest": "x"}}))
    with pytest.raises(ConfigurationError, match="before it runs"):
        profiler.blueprint("tiny", 0.5, groups="block")
    assert isinstance(profiler.blueprint("tiny", 0.5), Blueprint)


def test_states_that_depend_on_what_they_left_out_and_states_after_the_release_are_not_absorbed() -> None:
    model = build("llama")
    with GradientProfiler(model) as open_profiler:
        open_profiler.step(batch(seed=1))
    values = batch(seed=1)
    values["labels"][2] = -100
    with GradientProfiler(model, statistics="examples") as without_one:
        without_one.step(values)
    private = profile(model, (1, 2))
    gathered = GradientProfiler(model, privacy=PRIVACY)
    for depends in (open_profiler, without_one):
        with pytest.raises(ConfigurationError, match="with privacy only"):
            gathered.absorb(depends.state())
    gathered.absorb(private.state())
    released = gathered.blueprint("tiny", 0.5)
    with GradientProfiler(model, privacy=PRIVACY) as late:
        late.step(batch(seed=2), key=7)
    with pytest.raises(ConfigurationError, match="released"):
        gathered.absorb(late.state())
    assert gathered.blueprint("tiny", 0.5) == released
