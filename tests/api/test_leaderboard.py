"""The leaderboard: known answers on curves made by hand, and who is compared with whom."""

from __future__ import annotations

import math
from typing import Any

import httpx2
import pytest
from scipy import integrate

from app.registry.capability import MOST_VERTICES, area, cost_of, envelope, front, mean_interval, score_at
from app.registry.leaderboard import MOST_RUNS
from tests.api.test_runs import begin, points, tally
from tests.conftest import Server, execute

# --- curves


def test_an_envelope_never_gets_worse_and_keeps_both_ends_of_a_plateau() -> None:
    assert envelope([(1, 5.0), (2, 6.0), (3, 5.5), (4, 4.0)], "fall") == [(1, 5.0), (3, 5.0), (4, 4.0)]
    assert envelope([(1, 5.0), (2, 6.0), (3, 5.5), (4, 4.0)], "rise") == [(1, 5.0), (2, 6.0), (4, 6.0)]


def test_what_was_spent_stays_spent_on_an_envelope() -> None:
    assert envelope([(-1, 5.0), (3, 4.0), (2, 3.0), (4, 2.0)], "fall") == [(0.0, 5.0), (3, 3.0), (4, 2.0)]


def test_a_long_envelope_is_thinned_between_its_ends() -> None:
    curve = envelope([(gamma, 1 / gamma) for gamma in range(1, 10_000)], "fall")
    assert len(curve) == MOST_VERTICES
    assert (curve[0], curve[-1]) == ((1, 1.0), (9_999, 1 / 9_999))


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_thinned_envelope_has_the_values_of_the_whole(drop: float) -> None:
    """A loss that is steepest at its start, and one that drops late as well."""
    whole = [(float(step), 1.7 + 9 * step**-0.3 - drop * (step > 15_000)) for step in range(1, 20_001)]
    curve = envelope(whole, "fall")
    assert len(curve) == MOST_VERTICES
    for gamma in (1.5, 3.0, 20.0, 777.7, 12_000.5, 15_000.5, 19_999.0):
        psi = score_at(whole, gamma)
        assert psi is not None
        assert score_at(curve, gamma) == pytest.approx(psi, rel=1e-3)
        assert cost_of(curve, psi, "fall") == pytest.approx(gamma, rel=1e-3)
    assert area(curve, 1.0, 20_000.0) == pytest.approx(area(whole, 1.0, 20_000.0), rel=1e-3)


CURVE = [(1.0, 9.0), (2.0, 7.0), (4.0, 6.0)]


def test_scores_and_costs_lie_on_the_lines_between_vertices() -> None:
    assert [score_at(CURVE, gamma) for gamma in (0.5, 1.0, 1.5, 3.0, 4.0, 99.0)] == [None, 9.0, 8.0, 6.5, 6.0, 6.0]
    assert [cost_of(CURVE, psi, "fall") for psi in (10.0, 9.0, 8.0, 6.5, 6.0, 5.9)] == [1.0, 1.0, 1.5, 3.0, 4.0, None]
    rising = [(gamma, -psi) for gamma, psi in CURVE]
    assert [cost_of(rising, psi, "rise") for psi in (-8.0, -6.5, -5.9)] == [1.5, 3.0, None]


def test_the_area_is_the_integral_over_the_logarithm() -> None:
    assert area([(1.0, 3.0), (2.0, 3.0)], 1.0, math.e) == pytest.approx(3.0)
    numeric, _ = integrate.quad(lambda log: score_at(CURVE, math.exp(log)), math.log(1.2), math.log(8), limit=500)
    assert area(CURVE, 1.2, 8.0) == pytest.approx(numeric, rel=1e-7)
    assert area(CURVE, 0.5, 8.0) is None
    assert area([(0.0, 1.0)], 0.0, 1.0) is None


def test_the_front_holds_what_nothing_beats() -> None:
    pairs = [(1, 3.0), (2, 4.0), (2, 2.5), (3, 2.5), (4, 1.0)]
    assert front(pairs, "fall") == [(1, 3.0), (2, 2.5), (4, 1.0)]
    assert front(pairs, "rise") == [(1, 3.0), (2, 4.0)]


def test_the_interval_of_a_mean_is_students() -> None:
    assert mean_interval([1.0]) is None
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


# --- over HTTP


def report(http: httpx2.Client, *pairs: tuple[float, float], given: dict[str, Any] | None = None, **fields: Any) -> str:
    path = begin(http, **fields)
    http.post(f"{path}/points", json=points(*pairs)).raise_for_status()
    end = {"tally": given or tally(seconds=pairs[-1][0])}
    http.post(f"{path}/finish", json=end).raise_for_status()
    return path.rpartition("/")[2]


def board(http: httpx2.Client, **query: str) -> dict[str, Any]:
    asked = {"task": "code/loss", "resource": "seconds"} | query
    return dict(http.get("/v1/leaderboard", params=asked).raise_for_status().json())


def configured(rate: float) -> dict[str, Any]:
    return {"settings": {"rate": rate}}


def ranking(answer: dict[str, Any]) -> list[tuple[float, float | None]]:
    (group,) = answer["groups"]
    assert [entry["rank"] for entry in group["entries"]] == list(range(1, len(group["entries"]) + 1))
    return [(entry["settings"]["rate"], entry.get("value")) for entry in group["entries"]]


QUICK = ((1.0, 9.0), (2.0, 5.0), (4.0, 4.8))
SLOW = ((1.0, 9.0), (4.0, 6.0), (8.0, 3.0))


def test_who_leads_depends_on_where_runs_are_compared(publisher: httpx2.Client) -> None:
    report(publisher, *QUICK, **configured(1))
    report(publisher, *SLOW, **configured(2))
    assert ranking(board(publisher, at="gamma:4")) == [(1, 4.8), (2, 6.0)]
    assert ranking(board(publisher, at="gamma:8")) == [(2, 3.0), (1, 4.8)]  # what has ended keeps its score
    assert ranking(board(publisher, at="psi:7")) == [(1, 1.5), (2, 3.0)]
    assert ranking(board(publisher, at="psi:4.5")) == [(2, 6.0), (1, None)]
    assert ranking(board(publisher, at="gamma:0.5")) == [(2, None), (1, None)]
    (group,) = board(publisher)["groups"]
    assert group["at"] == {"axis": "gamma", "value": 4.0}  # the lower median of what they spent
    assert group["front"] == [[4.0, 4.8], [8.0, 3.0]]
    assert group["area_range"] == [1.0, 8.0]
    assert group["entries"][0]["area"] == pytest.approx(area(QUICK, 1.0, 8.0))
    assert group["entries"][0]["reached"] == 1


def test_a_run_that_stopped_at_once_does_not_decide_where_the_others_are_compared(publisher: httpx2.Client) -> None:
    report(publisher, *QUICK, **configured(1))
    report(publisher, *SLOW, **configured(2))
    report(publisher, (0.001, 8.9), **configured(3))
    assert ranking(board(publisher)) == [(1, 4.8), (2, 6.0), (3, 8.9)]


def test_what_was_spent_after_the_last_score_does_not_move_the_place_of_comparison(publisher: httpx2.Client) -> None:
    report(publisher, *QUICK, given=tally(seconds=1_000.0))
    (group,) = board(publisher)["groups"]
    assert group["at"] == {"axis": "gamma", "value": 4.0}
    assert group["entries"][0]["runs"][0]["gamma"] == 1_000


def test_a_rising_score_is_ranked_the_other_way(publisher: httpx2.Client) -> None:
    report(publisher, (1.0, 0.1), (2.0, 0.5), goal="rise", metric="accuracy", **configured(1))
    report(publisher, (1.0, 0.1), (2.0, 0.3), (3.0, 0.6), goal="rise", metric="accuracy", **configured(2))
    assert ranking(board(publisher, at="gamma:2")) == [(1, 0.5), (2, 0.3)]
    assert ranking(board(publisher, at="psi:0.6")) == [(2, 3.0), (1, None)]
    assert board(publisher)["groups"][0]["front"] == [[2.0, 0.5], [3.0, 0.6]]


def test_seeds_of_a_configuration_are_one_entry_with_its_uncertainty(publisher: httpx2.Client, server: Server) -> None:
    for seed, psi in enumerate((4.0, 5.0, 6.0)):
        report(publisher, (1.0, 9.0), (2.0, psi), seed=seed, **configured(1))
    report(publisher, (1.0, 9.0), (2.0, 8.0), seed=0, **configured(2))
    (group,) = board(publisher)["groups"]
    three, one = group["entries"]
    assert (three["seeds"], three["value"], len(three["runs"])) == (3, 5.0, 3)
    assert three["value_interval"] == pytest.approx(mean_interval([4.0, 5.0, 6.0]))
    assert one["seeds"] == 1
    assert "value_interval" not in one
    assert {run["psi"] for run in three["runs"] if run["on_front"]} == {4.0}

    report(publisher, (1.0, 9.0), (2.0, 6.0), seed=2, **configured(1))  # the same seed once more: no new evidence
    assert board(publisher)["groups"][0]["entries"][0]["seeds"] == 3
    publisher.headers["Authorization"] = f"Bearer {server.key('lab-b')}"
    report(publisher, (1.0, 9.0), (2.0, 3.0), seed=5, **configured(1))
    assert [entry["lab"] for entry in board(publisher)["groups"][0]["entries"]] == ["lab-b", "lab-a", "lab-a"]


def test_a_seed_that_does_not_get_there_takes_the_value_from_its_configuration(publisher: httpx2.Client) -> None:
    report(publisher, (1.0, 9.0), (2.0, 4.0), seed=0, **configured(1))
    report(publisher, (1.0, 9.0), (2.0, 8.0), seed=1, **configured(1))
    report(publisher, (1.0, 9.0), (9.0, 5.0), seed=0, **configured(2))
    answer = board(publisher, at="psi:5")
    assert ranking(answer) == [(2, 9.0), (1, None)]
    assert answer["groups"][0]["entries"][1]["reached"] == 0.5


def test_only_runs_that_measured_alike_are_ranked_against_each_other(publisher: httpx2.Client) -> None:
    def read(basis: str, *instruments: str, missing: tuple[str, ...] = ()) -> dict[str, Any]:
        method = {"basis": basis, "instruments": instruments, "missing": missing}
        return tally(seconds=2.0) | {
            "energy_kwh": 1.0,
            "methods": {"seconds": tally(seconds=1)["methods"]["seconds"], "energy_kwh": method},
        }

    def energetic(given: dict[str, Any], psi: float, **fields: Any) -> str:
        path = begin(publisher, **fields)
        both = {"first": 0, "points": [{"step": 1, "psi": psi, "gamma": {"energy_kwh": 1.0}}]}
        publisher.post(f"{path}/points", json=both)
        publisher.post(f"{path}/finish", json={"tally": given}).raise_for_status()
        return path.rpartition("/")[2]

    counters = [energetic(read("measured", "nvml_counter", "rapl"), psi, **configured(psi)) for psi in (2.0, 1.0)]
    guessed = energetic(read("estimated", "processor_watts"), 0.1)
    partial = energetic(read("partial", "nvml_counter", missing=("processor",)), 0.2)
    clock = report(publisher, (1.0, 5.0))
    other = energetic(read("measured", "nvml_counter", "rapl"), 7.0, metric="perplexity")
    unfinished = begin(publisher).rpartition("/")[2]
    no_points = begin(publisher)
    publisher.post(f"{no_points}/finish", json={"tally": read("measured", "nvml_counter", "rapl")})

    answer = board(publisher, resource="energy_kwh")
    groups = [
        (group["basis"], [run["id"] for entry in group["entries"] for run in entry["runs"]])
        for group in answer["groups"]
    ]
    assert groups == [("measured", counters[::-1]), ("estimated", [guessed]), ("partial", [partial])]
    assert answer["groups"][2]["missing"] == ["processor"]
    assert {(row["id"], row["reason"]) for row in answer["left_out"]} == {
        (clock, "not_read"),
        (other, "other_metric"),
        (unfinished, "unfinished"),
        (no_points.rpartition("/")[2], "no_points"),
    }
    assert board(publisher, resource="energy_kwh", metric="perplexity")["groups"][0]["entries"][0]["value"] == 7.0


def test_a_claim_that_cannot_be_right_is_marked_where_it_is_ranked(publisher: httpx2.Client) -> None:
    report(publisher, *QUICK, **configured(1))
    report(publisher, (3.0, 9.0), (1.0, 1.0), given=tally(seconds=3.0, energy_kwh=1e-12), **configured(2))
    (group,) = board(publisher, at="gamma:3")["groups"]
    first = group["entries"][0]
    assert first["settings"]["rate"] == 2
    assert first["runs"][0]["marks"] == ["energy_below_idle", "falling_gamma"]
    assert "marks" not in group["entries"][1] or not group["entries"][1]["runs"][0]["marks"]


def test_a_task_without_runs_has_an_empty_board(publisher: httpx2.Client) -> None:
    assert board(publisher) == {
        "task": "code/loss",
        "resource": "seconds",
        "groups": [],
        "left_out": [],
        "truncated": False,
    }


def test_runs_that_were_only_begun_or_have_another_metric_push_nobody_off_the_board(
    publisher: httpx2.Client, database_url: str
) -> None:
    report(publisher, *QUICK, **configured(1))
    other = report(publisher, *QUICK, metric="accuracy", goal="rise")
    begin(publisher)
    copied = "lab_id, key_id, task, model_name, begun, tally, outcome, curves, finished_at"
    execute(
        database_url,
        f"INSERT INTO runs (name, {copied}) SELECT gen_random_uuid(), {copied} FROM runs, "
        f"generate_series(1, {MOST_RUNS}) WHERE finished_at IS NULL OR name = '{other}'",
    )
    assert ranking(board(publisher, metric="eval_loss")) == [(1, 4.8)]
    assert board(publisher, metric="eval_loss")["truncated"]
    of_none = board(publisher, metric="perplexity")
    assert (of_none["metric"], of_none["groups"], of_none["truncated"]) == ("perplexity", [], True)
    assert {row["reason"] for row in of_none["left_out"]} == {"other_metric"}


def test_a_question_that_cannot_be_is_refused(publisher: httpx2.Client) -> None:
    asked = {"task": "code/loss", "resource": "seconds"}
    for query in ({"resource": "joy"}, {"at": "gamma:-1"}, {"at": "psi:nan"}, {"at": "tokens:1"}, {"task": "=cmd()"}):
        assert publisher.get("/v1/leaderboard", params=asked | query).status_code == 422, query


def test_the_largest_figures_are_still_numbers(publisher: httpx2.Client) -> None:
    for seed, psi in enumerate((1e100, -1e100)):
        report(publisher, (1e-300, 1e100), (1e100, psi), seed=seed, window=1)
    for at in ("gamma:1e99", "psi:-9e99", "psi:1e99", "gamma:1e0"):
        board(publisher, at=at)
