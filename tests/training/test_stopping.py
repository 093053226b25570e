"""The rule of marginal return, and its replay on finished curves."""

from __future__ import annotations

import doctest
import json
import math
import random
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import marginal_return
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Resource
from gradient_blueprints.training import replay as replays
from gradient_blueprints.training import stopping
from gradient_blueprints.training.replay import Check, pareto, replay, replay_early_stopping, returns, table
from gradient_blueprints.training.stopping import MarginalReturn, Reason, priced


def falling(steps: int, noise: float = 0.0, seed: int = 0) -> list[Check]:
    noisy = random.Random(seed)
    return [Check(float(step), 3 + 10 * step**-0.5 + noisy.gauss(0, noise)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("module", [stopping, replays])
def test_the_examples_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_the_ratio_is_the_quotient_of_the_differences_over_the_window() -> None:
    rule = MarginalReturn(eta=0.0, window=2)
    rule.update(10.0, 0.0)
    rule.update(9.0, 1.0)
    assert rule.update(6.0, 101.0).ratio == pytest.approx(4 / 101)  # a mean of the quotients would be 0.515


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5)), min_size=3, max_size=30), st.integers(1, 4))
def test_a_score_that_rises_is_judged_like_its_negative_that_falls(
    steps: list[tuple[float, float]], window: int
) -> None:
    up, down = (MarginalReturn(0.1, 2, window, goal) for goal in ("rise", "fall"))
    gamma = 0.0
    for psi, cost in steps:
        gamma += cost
        assert up.update(psi, gamma) == down.update(-psi, gamma)


def test_a_single_bad_check_does_not_stop_and_a_good_one_begins_the_count_anew() -> None:
    rule = MarginalReturn(eta=0.5, patience=2, window=1)
    reasons = [rule.update(psi, gamma).reason for gamma, psi in enumerate([9.0, 8.9, 7.0, 6.9, 6.8])]
    assert reasons == [Reason.FILLING, Reason.BELOW, Reason.PAYS, Reason.BELOW, Reason.STOP]


def test_a_wider_window_stops_at_about_the_same_place_whatever_the_noise() -> None:
    def stops(window: int) -> list[float]:
        rows = [replay(falling(100, 0.1, seed), [0.05], [3], [window])[0] for seed in range(20)]
        return [row.stopped_at if row.stopped_at is not None else 99 for row in rows]

    assert statistics.stdev(stops(10)) < statistics.stdev(stops(1)) / 2


def test_a_learning_rate_decay_that_lies_ahead_keeps_it_from_stopping() -> None:
    rule = MarginalReturn(eta=0.5, patience=1, window=1)
    rule.update(9.0, 0.0)
    assert rule.update(8.9, 1.0, decay_ahead=True).reason is Reason.DECAY_AHEAD
    assert rule.update(7.0, 2.0).reason is Reason.PAYS  # what the decay brought
    assert rule.update(6.9, 3.0).stop


def test_checks_before_the_decay_do_not_count_towards_patience() -> None:
    rule = MarginalReturn(eta=0.5, patience=2, window=1)
    decisions = [rule.update(9.0, float(gamma), decay_ahead=gamma < 5) for gamma in range(7)]
    assert [decision.stop for decision in decisions] == [False] * 6 + [True]


def test_a_run_that_diverges_to_nan_stops_after_its_patience() -> None:
    rule = MarginalReturn(eta=0.0, patience=2, window=1)
    rule.update(5.0, 0.0)
    assert not rule.update(math.nan, 1.0).stop
    assert rule.update(math.nan, 2.0).stop


def test_a_gamma_that_falls_is_refused_and_one_that_stands_says_nothing() -> None:
    rule = MarginalReturn(eta=0.1, patience=1, window=1)
    rule.update(5.0, 2.0)
    assert rule.update(5.0, 2.0).ratio is None
    with pytest.raises(ValueError, match="fell"):
        rule.update(5.0, 1.0)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=20), st.integers(0, 19))
def test_a_rule_that_was_saved_and_resumed_decides_as_one_that_ran_on(values: list[float], cut: int) -> None:
    whole, first = MarginalReturn(0.2, 2, 3), MarginalReturn(0.2, 2, 3)
    for gamma, psi in enumerate(values[:cut]):
        assert whole.update(psi, gamma) == first.update(psi, gamma)
    second = MarginalReturn(**first.settings())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for gamma, psi in enumerate(values[cut:], start=cut):
        assert whole.update(psi, gamma) == second.update(psi, gamma)


@pytest.mark.parametrize("options", [{"eta": math.nan}, {"eta": 1, "patience": 0}, {"eta": 1, "window": 0}])
def test_senseless_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="finite eta"):
        MarginalReturn(**options)  # type: ignore[arg-type]


def test_a_price_on_what_was_not_read_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="energy_kwh cannot be read"):
        priced({Resource.SECONDS: 1.0}, {Resource.ENERGY_KWH: 0.3})


def test_a_lower_eta_never_saves_more_and_never_loses_more_on_a_smooth_curve() -> None:
    rows = replay(falling(200), [0.2, 0.1, 0.05, 0.02], [1], [5])
    assert [row.saved for row in rows] == sorted((row.saved for row in rows), reverse=True)
    assert [row.lost for row in rows] == sorted((row.lost for row in rows), reverse=True)
    assert rows[0].lost == pytest.approx(falling(200)[rows[0].stopped_at or 0].psi - falling(200)[-1].psi)


def test_early_stopping_does_not_stop_on_a_curve_that_always_falls() -> None:
    assert all(row.stopped_at is None and row.saved == 0 for row in replay_early_stopping(falling(200)))
    assert "never stops" in table(replay_early_stopping(falling(200)))


def test_early_stopping_waits_for_patience_checks_without_a_better_one() -> None:
    curve = [Check(float(number), psi) for number, psi in enumerate([5, 4, 4.5, 4.2, 3.9, 4, 4, 4, 1], start=1)]
    (row,) = replay_early_stopping(curve, patience=[3])
    assert row.stopped_at == 7
    assert row.lost == pytest.approx(3.0)


def test_the_pareto_front_holds_what_nothing_beats_in_both() -> None:
    rows = replay(falling(100, 0.05), [0.5, 0.2, 0.1, 0.05, 0.01], [1, 3], [1, 5])
    front = pareto(rows)
    assert front
    for row in rows:
        beaten = any(
            other.saved >= row.saved and other.lost <= row.lost and (other.saved, other.lost) != (row.saved, row.lost)
            for other in rows
        )
        assert beaten or any((row.saved, row.lost) == (best.saved, best.lost) for best in front)
    assert [row.saved for row in front] == sorted(row.saved for row in front)


def test_the_last_fifteen_percent_of_the_papers_shape_bring_less_than_a_hundredth() -> None:
    curve = marginal_return.chinchilla_65b()
    last = next(check for check in curve if check.gamma >= 0.85 * curve[-1].gamma)
    assert 0.005 < last.psi - curve[-1].psi < 0.01
    eta = min(ratio for ratio in returns(curve))
    (row,) = replay(curve, [(last.psi - curve[-1].psi) / (curve[-1].gamma - last.gamma)], [1])
    assert eta > 0
    assert 0.05 < row.saved < 0.15
    assert row.lost < 0.01


@pytest.mark.parametrize("curve", [*map(marginal_return.read_curve, marginal_return.SCHEDULES), None])
def test_a_row_of_the_page_comes_out_again_with_the_eta_that_it_prints(
    curve: list[Check] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = curve or marginal_return.chinchilla_65b()
    marginal_return.show("a curve", curve)
    printed = capsys.readouterr().out
    rules = re.findall(r"^\| eta (\S+), patience (\d), window 5 \|", printed, re.MULTILINE)
    assert len(rules) == 8
    for eta, patience in rules:
        assert table(replay(curve, [float(eta)], [int(patience)])).splitlines()[-1] in printed


def test_an_eta_is_printed_as_it_is() -> None:
    (row,) = replay(falling(20), [0.12345678], [1])
    assert row.rule == "eta 0.12345678, patience 1, window 5"


@pytest.mark.parametrize("schedule", marginal_return.SCHEDULES)
def test_on_real_curves_a_stop_before_the_decay_loses_more_than_one_under_guard(schedule: str) -> None:
    guarded = marginal_return.read_curve(schedule)
    unguarded = [check._replace(decay_ahead=False) for check in guarded]
    eta = sorted(returns(unguarded))[len(guarded) // 3]
    (free,), (held,) = replay(unguarded, [eta], [1]), replay(guarded, [eta], [1])
    assert held.lost <= free.lost
    assert any(check.decay_ahead for check in guarded)
