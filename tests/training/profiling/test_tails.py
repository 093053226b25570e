"""Tail fits on samples of known truth, and against the powerlaw package."""

import math
import warnings
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradient_blueprints.theory import best_fraction, gaussian_retained_mass
from gradient_blueprints.training.profiling.histograms import EDGES, TOP, MagnitudeHistogram
from gradient_blueprints.training.profiling.tails import (
    best_fraction_of_curve,
    fit_tail,
    hill_of_counts,
    tail_excess,
    versus_lognormal,
)

ENTRIES = 1_000_000


def sample(name: str, entries: int = ENTRIES, seed: int = 0) -> Tensor:
    """Signed values of gradient size."""
    rng = np.random.default_rng(seed)
    values = {
        "pareto": lambda: (1 / rng.random(entries)) ** 0.6,  # |x|_(r) ~ r^-0.6
        "lognormal": lambda: rng.lognormal(0, 1.5, entries),
        "laplace": lambda: rng.laplace(size=entries),
        "gaussian": lambda: rng.normal(size=entries),
        "student": lambda: rng.standard_t(3, entries),
    }[name]()
    return torch.from_numpy(values * rng.choice([-1e-5, 1e-5], entries)).float()


def exact_mass(values: Tensor, share: float) -> float:
    magnitudes = values.double().abs().sort(descending=True).values
    return float(magnitudes[: round(share * len(magnitudes))].sum() / magnitudes.sum())


@pytest.mark.parametrize("name", ["pareto", "lognormal", "laplace", "gaussian", "student"])
def test_retained_mass_is_the_sorted_one(name: str) -> None:
    values = sample(name)
    histogram = MagnitudeHistogram.of(values)
    shares = [0.0001, 0.001, 0.01, 0.1, 0.3, 0.7, 1.0]
    found = histogram.retained_mass(np.array(shares))
    np.testing.assert_allclose(found, [exact_mass(values, share) for share in shares], rtol=2e-4)


def test_gaussian_sample_keeps_the_gaussian_null() -> None:
    found = MagnitudeHistogram.of(sample("gaussian")).retained_mass(np.array([0.1]))
    assert found[0] == pytest.approx(gaussian_retained_mass(0.1), rel=3e-3)


@pytest.mark.parametrize("name", ["pareto", "lognormal", "laplace", "gaussian", "student"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_hill_is_the_mean_excess_of_the_sorted_logarithms(name: str, share: float) -> None:
    """The share 0.001 comes from the exact top, the larger ones from bins."""
    values = sample(name)
    excess = tail_excess(MagnitudeHistogram.of(values), share)
    assert excess is not None
    logs = values.double().abs().log().sort(descending=True).values
    expected = float((logs[: excess.entries] - math.log(excess.threshold)).mean())
    assert excess.mean == pytest.approx(expected, rel=2e-3)
    assert excess.share == pytest.approx(share, rel=0.25)


def test_exponents_of_many_histograms_are_of_the_entries_that_the_fit_takes() -> None:
    """256 entries, of which 1 % would be three, and 10,000; the two thresholds lie in the same bin."""
    finite = 2_000  # bins
    for entries, apart in ((256, 0.06), (10_000, 0.02)):
        samples = [MagnitudeHistogram.of(sample("pareto", entries, seed)) for seed in range(50)]
        expected = np.array([excess.mean for each in samples if (excess := tail_excess(each, 0.01))])
        counts = np.stack([each.counts[:finite] for each in samples]).astype(float)
        found = hill_of_counts(counts, 0.01, EDGES[: finite + 1])
        assert found.mean() == pytest.approx(expected.mean(), abs=apart)
        assert np.abs(found - expected).mean() < apart


def test_pareto_gives_its_exponent_at_every_cut_off_and_wins_against_the_lognormal() -> None:
    tail = fit_tail(MagnitudeHistogram.of(sample("pareto")))
    assert tail is not None
    assert tail.alpha == pytest.approx(0.6, rel=0.03)
    assert [alpha for _, alpha in tail.hill] == pytest.approx([0.6] * 5, rel=0.1)
    assert tail.log_binned == pytest.approx(0.6, rel=0.05)
    assert tail.ks < 0.02
    assert tail.power_law


@pytest.mark.parametrize("name", ["lognormal", "laplace", "gaussian"])
def test_other_tails_lose_against_the_lognormal_and_are_never_about_one(name: str) -> None:
    """Least squares over raw ranks gives 0.81 for the half-normal and 1.00 for Laplace."""
    tail = fit_tail(MagnitudeHistogram.of(sample(name)))
    assert tail is not None
    assert not tail.power_law
    assert tail.alpha < 0.7
    assert tail.ks > 0.01
    exponents = [alpha for _, alpha in tail.hill]
    assert exponents == sorted(exponents)  # a lighter tail looks lighter the further out it is read


def test_a_mixture_that_neither_law_describes_is_no_power_law() -> None:
    """More dispersed than any log-normal: the ratio is a tie, and the distance says that both are wrong."""
    mixed = torch.cat([sample("laplace", 900_000), 1_000 * sample("laplace", 9_000, seed=1)])
    tail = fit_tail(MagnitudeHistogram.of(mixed))
    assert tail is not None
    assert tail.ks > 0.03
    assert not tail.power_law


def test_student_tail_tends_to_one_third_far_out() -> None:
    tail = fit_tail(MagnitudeHistogram.of(sample("student")))
    assert tail is not None
    assert tail.hill[0][1] == pytest.approx(1 / 3, rel=0.05)


def test_exponential_excess_is_a_power_law_and_half_normal_excess_a_lognormal() -> None:
    assert versus_lognormal(10_000, 1.0, 2.0) > 0
    rng = np.random.default_rng(0)
    y = np.abs(rng.normal(size=10_000))
    assert versus_lognormal(len(y), y.mean(), (y**2).mean()) < -100


@pytest.mark.parametrize("name", ["pareto", "lognormal", "laplace"])
def test_agrees_with_the_powerlaw_package(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that knows newer libraries only by their warnings
        powerlaw = pytest.importorskip("powerlaw")
        values = sample(name, 200_000)
        histogram = MagnitudeHistogram.of(values)
        excess = tail_excess(histogram, 0.01)
        assert excess is not None
        fit = powerlaw.Fit(
            values.double().abs().numpy() * 1e5,
            xmin=excess.threshold * 1e5,
            parameter_ranges={"alpha": [1, 50]},
            verbose=0,
        )
        ratio, _ = fit.distribution_compare("power_law", "lognormal")
    assert excess.mean == pytest.approx(1 / (fit.power_law.alpha - 1), rel=1e-3)
    tail = fit_tail(histogram)
    assert tail is not None
    assert tail.ks == pytest.approx(fit.power_law.D, abs=2e-3)
    unpenalised = tail.versus_lognormal - math.log(excess.entries) / 2
    assert unpenalised == pytest.approx(ratio, abs=0.05 * abs(ratio) + 0.5)


@pytest.mark.parametrize("name", ["pareto", "lognormal", "gaussian"])
def test_best_fraction_of_the_curve_beats_every_other(name: str) -> None:
    values = sample(name, 50_000)
    best = best_fraction_of_curve(MagnitudeHistogram.of(values), 1, 12)
    assert best is not None
    gain = exact_mass(values, best) / (1 + 12 * best)
    assert all(exact_mass(values, k) / (1 + 12 * k) <= gain * 1.001 for k in np.geomspace(0.001, 1, 60))


def test_best_fraction_is_near_the_closed_form_where_the_curve_is_a_power() -> None:
    """mass(k) = k^gamma exactly, gamma = 0.4: ranks by the derivative of the curve."""
    ranks = (np.arange(200_000) + 1) / 200_000
    histogram = MagnitudeHistogram.of(torch.from_numpy(np.diff(ranks**0.4, prepend=0)))
    found = best_fraction_of_curve(histogram, 1, 4)
    assert found == pytest.approx(best_fraction(0.4, 1, 4).fraction, rel=0.05)


def test_zeros_count_among_all_entries() -> None:
    values = torch.cat([sample("pareto", 10_000), torch.zeros(90_000)])
    histogram = MagnitudeHistogram.of(values)
    assert histogram.entries == 100_000
    assert histogram.retained_mass(np.array([0.1]))[0] == pytest.approx(1)


@pytest.mark.parametrize("values", [torch.zeros(5_000), torch.ones(5_000), torch.randn(20), torch.zeros(0)])
def test_no_tail_is_fitted_where_there_is_none(values: Tensor) -> None:
    assert fit_tail(MagnitudeHistogram.of(values)) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6_000), min_size=2, max_size=4), st.randoms())
def test_histograms_merge_in_any_order_into_that_of_everything(lengths: list[int], order: Random) -> None:
    parts = [sample("student", length, seed) for seed, length in enumerate(lengths)]
    whole = MagnitudeHistogram.of(torch.cat(parts))
    histograms = [MagnitudeHistogram.of(part) for part in parts]
    order.shuffle(histograms)
    while len(histograms) > 1:  # in any grouping
        one = histograms.pop(order.randrange(len(histograms)))
        two = histograms.pop(order.randrange(len(histograms)))
        histograms.append(one.merged(two))
    merged = histograms[0]
    assert (merged.counts == whole.counts).all()
    assert (merged.top == whole.top).all()
    assert len(whole.top) == min(TOP, sum(lengths))
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-12)
