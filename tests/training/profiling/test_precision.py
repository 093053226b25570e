"""Stopping by itself, and how often intervals that stopped a run hold the truth."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Statistic
from gradient_blueprints.training.profiling import GradientProfiler, Until
from gradient_blueprints.training.profiling.document import DocumentSettings, bootstrap, precise_enough
from tests.training.profiling.small_models import Batch, batch, build


def endless() -> Iterator[Batch]:
    seed = 0
    while True:
        seed += 1
        yield batch(seed=seed)


def test_run_stops_when_the_intervals_of_most_layers_are_narrow() -> None:
    until = Until(0.5, share=0.8, batches=4)
    with GradientProfiler(build("llama"), until=until) as profiler:
        waiting = endless()
        measured = profiler.run(waiting)
        torch.testing.assert_close(next(waiting), batch(seed=measured + 1))  # none was taken and not measured
        assert profiler.run(endless()) == 0  # enough is enough
        bio = profiler.run((batch(seed=seed) for seed in range(3)), domain="bio")
    blueprint = profiler.blueprint("tiny", 1.0)
    widths = []
    for layer in blueprint.layers:
        assert layer.gradient_norm_ci is not None
        widths.append((layer.gradient_norm_ci[1] - layer.gradient_norm_ci[0]) / layer.gradient_norm)
    assert np.mean(np.array(widths) <= 0.5) >= 0.8
    assert profiler.precise_enough()
    assert measured == len(profiler.domain().records) >= 4
    assert bio == 3
    assert blueprint.extra is not None
    assert blueprint.extra["profile"]["until"] == {  # type: ignore[index, call-overload]
        "width": 0.5,
        "share": 0.8,
        "batches": 4,
        "reached": {"bio": False, "general": True},
    }


def test_one_layer_that_never_settles_does_not_keep_it_running() -> None:
    rng = np.random.default_rng(0)
    norms = 1 + 0.05 * rng.standard_normal((40, 20))
    norms[:, 3] = rng.pareto(0.8, 40)
    assert precise_enough(norms, DocumentSettings(until=Until(0.1)))
    assert not precise_enough(norms, DocumentSettings(until=Until(0.1, share=1.0)))
    assert precise_enough(norms, DocumentSettings(Statistic.MEDIAN, until=Until(0.1)))


def test_looks_are_few() -> None:
    looks = [batches for batches in range(1, 1_000) if Until(0.1).looks_at(batches)]
    assert looks[:5] == [16, 20, 25, 31, 38]
    assert len(looks) < 20


def test_intervals_that_stopped_a_run_hold_the_truth_less_often_than_they_say() -> None:
    """Log-normal norms, 25 runs of 20 layers; docs/profiling.md tells the loss."""
    rng = np.random.default_rng(1)
    settings = DocumentSettings(until=Until(0.15))
    truth = np.exp(0.3**2 / 2)
    held = []
    for _ in range(25):
        norms = np.exp(0.3 * rng.standard_normal((400, 20)))  # 20 layers a run
        assert settings.until is not None
        size = next(n for n in range(1, 400) if settings.until.looks_at(n) and precise_enough(norms[:n], settings))
        interval = bootstrap(norms[:size], Statistic.MEAN, 0)
        assert interval is not None
        held.append(((interval[0] <= truth) & (truth <= interval[1])).mean())
    assert 0.85 < np.mean(held) < 0.96


@pytest.mark.parametrize("wrong", [{"width": 0}, {"width": 0.1, "share": 0}, {"width": 0.1, "batches": 1}])
def test_conditions_that_cannot_be_met_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Until(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="examples"):
        GradientProfiler(build("llama"), until=0.1, statistics="examples")


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_a_bar_is_shown_where_it_is_asked_for_or_somebody_looks(
    progress: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()  # no terminal
    monkeypatch.setattr("sys.stderr", screen)
    with GradientProfiler(build("llama"), statistics="examples", progress=progress) as profiler:
        profiler.run([batch(), batch(seed=2)], domain="bio")
    assert ("bio" in screen.getvalue()) == shown
    assert ("2/2" in screen.getvalue()) == shown
