"""Scores of coordinates, and how a budget is dealt to tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evidence import allocation, arms, layers, scores
from evidence.gradients import Array, Factors, Moments
from evidence.runs import Choice
from evidence.scores import Knowledge

SHAPE = (6, 5)


def knowledge(count: int, noise: float = 1.0, seed: int = 0) -> Knowledge:
    """Gradients μ + noise, where μ is separable up to a sign; the published factors are μ²'s."""
    generator = np.random.default_rng(seed)
    size = np.outer(generator.exponential(size=6), generator.exponential(size=5))
    mean = size * generator.choice((-1, 1), SHAPE)
    seen = mean + noise * generator.normal(size=(count, *SHAPE))
    moments = Moments(count, {"w": single(seen.mean(0))}, {"w": single((seen**2).mean(0))})
    square = size**2
    return Knowledge(seed, moments, Factors({"w": single(square.mean(1))}, {"w": single(square.mean(0))}))


def single(values: np.ndarray) -> Array:
    return np.asarray(values, np.float32)


def ranks(values: np.ndarray) -> list[int]:
    return [int(index) for index in np.argsort(values.reshape(-1))]


def test_a_large_local_sample_overrules_the_published_factors() -> None:
    known = knowledge(count=20_000, noise=0.01)
    assert ranks(scores.bayes(known, "w", SHAPE)) == ranks(scores.local_mean(known, "w", SHAPE))


def test_a_local_sample_that_is_all_noise_leaves_the_published_factors() -> None:
    known = knowledge(count=2, noise=300.0, seed=5)
    agreement = np.corrcoef(
        np.log(scores.bayes(known, "w", SHAPE)).reshape(-1), np.log(scores.published(known, "w", SHAPE)).reshape(-1)
    )[0, 1]
    assert agreement > 0.95


def test_without_a_local_sample_the_posterior_is_the_prior() -> None:
    known = Knowledge(0, None, knowledge(2).published)
    np.testing.assert_array_equal(scores.bayes(known, "w", SHAPE), scores.published(known, "w", SHAPE))


def test_factors_of_a_separable_matrix_are_exact() -> None:
    square = np.outer(np.arange(1, 7), np.arange(1, 6)).astype(np.float32)
    np.testing.assert_allclose(scores.separable(square), square, rtol=1e-6)


def test_ranks_within_rows_take_the_same_number_from_each() -> None:
    chosen = scores.top(scores.named("row:local_mean", 0.4)(knowledge(8), "w", SHAPE), 0.4)
    assert np.bincount(chosen // 5).tolist() == [2] * 6


@pytest.mark.parametrize("name", ["random", "half:published", "sampled1:bayes", "column:bayes"])
def test_every_score_chooses_as_many_as_asked_and_the_same_again(name: str) -> None:
    score = scores.named(name, 0.2)
    first, again = (scores.top(score(knowledge(4), "w", SHAPE), 0.2) for _ in range(2))
    assert len(set(first.tolist())) == 6
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("rules", [[], ["vectors"], ["balanced0.5"], ["vectors", "balanced0.5"]])
def test_the_shares_of_the_tensors_spend_the_budget(rules: list[str]) -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4))
    row = {name: np.full(len(each), i + 1, np.float32) for i, (name, each) in enumerate(model.named_parameters())}
    shares = allocation.shares(model, 0.3, rules, Knowledge(0, None, Factors(row, {})))
    spent = sum(shares[name] * each.numel() for name, each in model.named_parameters())
    assert spent == pytest.approx(0.3 * 254)
    assert all(0 < share <= 1 for share in shares.values())


def test_linear_layers_take_what_embeddings_and_vectors_leave() -> None:
    model = nn.Sequential(nn.Embedding(20, 10), nn.Linear(10, 4), nn.Linear(4, 20, bias=False))
    model[2].weight = nn.Parameter(torch.ones(20, 4))
    shares = allocation.shares(model, 0.1, ["linear"], Knowledge(0))
    assert shares == pytest.approx({"0.weight": 0.0, "1.bias": 0.0, "1.weight": 32.4 / 120, "2.weight": 32.4 / 120})
    chosen = arms.coordinates(model, Choice("coordinates", "linear+random", 0.1), Knowledge(0))
    assert [(entry.name, entry.selected) for entry in chosen] == [("1.weight", 11), ("2.weight", 22)]
    assert not model[0].weight.requires_grad


def test_spectrums_ratio_tells_a_low_rank_matrix_from_noise() -> None:
    noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    spikes = noise + 8 * torch.ones(60, 40)
    # scaled alike, since the ratio is over the largest singular value
    assert layers.signal_to_noise(spikes) * float(torch.linalg.matrix_norm(spikes, 2)) > layers.signal_to_noise(
        noise
    ) * float(torch.linalg.matrix_norm(noise, 2))
    even = torch.eye(30)
    assert layers.signal_to_noise(even) == pytest.approx(30.0)  # no spread: all above the edge, noise taken as 1
