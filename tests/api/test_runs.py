"""Runs over HTTP: begun once, appended in batches, finished for ever, and what in them cannot be right."""

from __future__ import annotations

import uuid
from typing import Any

import asyncpg
import httpx2
import pytest

from app.registry.plausibility import accelerator_of, marks_of
from gradient_blueprints.record_models import MAX_POINTS, Implausible, NewRun, ReportedPoint
from gradient_blueprints.run_models import Basis, Instrument, Method, Resource, Tally
from tests.api.test_ready_answers import statements_by_the_orm
from tests.conftest import Server, execute

GIVEN = {"basis": "measured", "instruments": ["given"]}


def new_run(**fields: Any) -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "task": "code/loss", "model_id": "tiny", "metric": "eval_loss"} | fields


def points(*pairs: tuple[float, float], first: int = 0) -> dict[str, Any]:
    """A batch of pairs (seconds, psi)."""
    return {
        "first": first,
        "points": [
            {"step": 10 * number, "psi": psi, "gamma": {"seconds": seconds}}
            for number, (seconds, psi) in enumerate(pairs, first)
        ],
    }


def tally(**figures: float) -> dict[str, Any]:
    return {**figures, "methods": dict.fromkeys(figures, GIVEN), "hardware": {"host-7f/0": "a processor"}}


def begin(http: httpx2.Client, **fields: Any) -> str:
    return f"/v1/runs/{http.post('/v1/runs', json=new_run(**fields)).raise_for_status().json()['id']}"


CURVE = [(1.0, 9.0), (2.0, 7.0), (3.0, 7.5), (4.0, 6.0)]


def test_a_run_is_begun_appended_and_finished_with_what_the_registry_works_out(publisher: httpx2.Client) -> None:
    begun = publisher.post("/v1/runs", json=(run := new_run(window=2, seed=3, settings={"lr": 1e-3, "warm": True})))
    assert begun.status_code == 201
    path = begun.headers["location"]
    assert begun.json() == {
        **run,
        "goal": "fall",
        "callbacks": [],
        "lab": "lab-a",
        "created_at": begun.json()["created_at"],
        "points": 0,
        "marks": [],
        "unchecked": [],
    }
    assert publisher.post(f"{path}/points", json=points(*CURVE[:2])).json()["points"] == 2
    publisher.post(f"{path}/points", json=points(*CURVE[2:], first=2) | {"tally": tally(seconds=4.0)})
    before = publisher.get(path).json()
    assert (before["points"], before["last"]) == (4, {"step": 30, "psi": 6.0, "gamma": {"seconds": 4.0}})
    assert publisher.get(f"{path}/model-card").json()["code"] == "run_not_found"
    end = {"tally": tally(seconds=5.0, tokens=100.0), "stopped": "MarginalReturn"}
    finished = publisher.post(f"{path}/finish", json=end).raise_for_status().json()
    assert finished["final"] == {"psi": 6.0, "best_psi": 6.0, "gamma": {"seconds": 5.0, "tokens": 100.0}}
    assert finished["last_ratio"] == {"seconds": 0.5}  # from 7 to 6 within 2 seconds
    assert finished["stopped"] == "MarginalReturn"
    assert finished["marks"] == []
    assert "energy_below_idle" in finished["unchecked"]
    assert publisher.get(path).json() == finished
    card = publisher.get(finished["model_card"])
    assert card.headers["content-type"].startswith("text/markdown")
    assert "| seconds | 5 s | measured: given |" in card.text


@pytest.mark.parametrize("fields", [{}, {"training_checkpoint": 0.8}, {"selection": {"trained": 1, "parameters": 2}}])
def test_the_card_tells_a_training_type_where_the_run_began_from_something(
    publisher: httpx2.Client, fields: dict[str, Any]
) -> None:
    path = begin(publisher, **fields)
    publisher.post(f"{path}/finish", json={"tally": tally(carbon_kg=2.0)}).raise_for_status()
    card = publisher.get(f"{path}/model-card").text
    assert "emissions: 2000.0" in card
    assert ('training_type: "fine-tuning"' in card) is bool(fields)
    assert ("training_type" in card) is bool(fields)


def test_a_long_run_comes_to_the_same_as_a_short_one(publisher: httpx2.Client) -> None:
    path = begin(publisher, window=1)
    curve = [(float(second), 9.0 - second / 500) for second in range(1, 1501)]
    for first in range(0, len(curve), 500):
        publisher.post(f"{path}/points", json=points(*curve[first : first + 500], first=first)).raise_for_status()
    finished = publisher.post(f"{path}/finish", json={"tally": tally(seconds=1500.0)}).raise_for_status().json()
    assert finished["final"] == {"psi": 6.0, "best_psi": 6.0, "gamma": {"seconds": 1500.0}}
    assert finished["last_ratio"] == {"seconds": pytest.approx(1 / 500)}
    assert finished["marks"] == []
    board = publisher.get("/v1/leaderboard", params={"task": "code/loss", "resource": "seconds", "at": "psi:7"}).json()
    assert board["groups"][0]["entries"][0]["value"] == pytest.approx(1000.0)


def test_only_the_leaderboard_reads_curves(publisher: httpx2.Client) -> None:
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points(*CURVE)).raise_for_status()
    publisher.post(f"{path}/finish", json={"tally": tally(seconds=4.0)}).raise_for_status()
    with statements_by_the_orm() as statements:
        for read in ("/v1/runs", path, f"{path}/points", f"{path}/model-card"):
            publisher.get(read).raise_for_status()
        assert len(statements) >= 4
        assert not any("curves" in statement for statement in statements)


def test_neither_spans_nor_names_of_sensors_are_kept(publisher: httpx2.Client) -> None:
    path = begin(publisher)
    span = {"sensor": "host-7f", "resource": "seconds", "started": 0, "ended": 1, "amount": 1.0}
    publisher.post(f"{path}/finish", json={"tally": tally(seconds=1.0) | {"spans": [span]}})
    shown = publisher.get(path)
    assert shown.json()["tally"]["hardware"] == {"1": "a processor"}
    assert "host-7f" not in shown.text


def test_everything_may_be_sent_twice_and_nothing_changed(publisher: httpx2.Client) -> None:
    run = new_run()
    path = f"/v1/runs/{run['id']}"
    assert [publisher.post("/v1/runs", json=run).status_code for _ in range(2)] == [201, 200]
    assert publisher.post("/v1/runs", json=run | {"seed": 1}).json()["code"] == "already_exists"
    for _ in range(2):
        assert publisher.post(f"{path}/points", json=points(*CURVE[:2])).json()["points"] == 2
    overlapping = points(*CURVE)
    assert publisher.post(f"{path}/points", json=overlapping).json()["points"] == 4
    end = {"tally": tally(seconds=5.0)}
    first = publisher.post(f"{path}/finish", json=end)
    assert publisher.post(f"{path}/finish", json=end).json() == first.json()
    assert publisher.post(f"{path}/points", json=overlapping).status_code == 200
    assert publisher.post(f"{path}/finish", json={"tally": tally(seconds=6.0)}).json()["code"] == "run_finished"
    late = publisher.post(f"{path}/points", json=points((6.0, 5.0), first=4))
    assert (late.status_code, late.json()["code"]) == (409, "run_finished")
    listed = publisher.get(f"{path}/points").json()["points"]
    assert [(point["gamma"]["seconds"], point["psi"]) for point in listed] == CURVE


def test_points_that_do_not_go_on_where_the_run_stands_are_refused(publisher: httpx2.Client) -> None:
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points(*CURVE[:2]))
    gap = publisher.post(f"{path}/points", json=points(*CURVE[3:], first=3)).json()
    assert (gap["code"], gap["points"]) == ("run_conflict", 2)
    other = publisher.post(f"{path}/points", json=points((1.0, 8.0))).json()
    assert (other["code"], other["points"]) == ("run_conflict", 2)
    again = points((3.0, 7.0), first=2)
    again["points"][0]["step"] = 10
    refused = publisher.post(f"{path}/points", json=again)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/points/0/step")
    assert publisher.get(path).json()["points"] == 2


IMPOSSIBLE_BATCHES: list[dict[str, Any]] = [
    {"first": -1, "points": []},
    points((1.0, 2.0), first=MAX_POINTS),
    {"first": 0, "points": []},
    {"first": 0, "points": [{"step": 1, "psi": 1.0, "gamma": {}}]},
    {"first": 0, "points": [{"step": 1, "psi": 1.0, "gamma": {"joy": 1.0}}]},
    {"first": 0, "points": [{"step": 1, "psi": 1e200, "gamma": {"seconds": 1.0}}]},
    {"first": 0, "points": [{"step": step, "psi": 1.0, "gamma": {"seconds": 1.0}} for step in (2, 2)]},
    {"first": 0, "points": [{"step": step, "psi": 1.0, "gamma": {"seconds": 1.0}} for step in range(1_001)]},
]


def test_a_batch_that_cannot_be_is_refused(publisher: httpx2.Client) -> None:
    path = begin(publisher)
    for body in IMPOSSIBLE_BATCHES:
        assert publisher.post(f"{path}/points", json=body).status_code == 422, body


def test_a_run_has_a_largest_number_of_points(publisher: httpx2.Client, database_url: str) -> None:
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points((1.0, 2.0)))
    execute(
        database_url,
        "INSERT INTO run_points SELECT run_id, n, n, psi, gamma FROM run_points, "
        f"generate_series(1, {MAX_POINTS - 2}) n",
        f"UPDATE runs SET points = {MAX_POINTS - 1}",
    )
    two = points((1.0, 2.0), (1.0, 2.0), first=MAX_POINTS - 1)
    assert publisher.post(f"{path}/points", json=two).json()["code"] == "payload_too_large"


def test_only_its_own_lab_goes_on_with_a_run(publisher: httpx2.Client, server: Server) -> None:
    run = new_run()
    publisher.post("/v1/runs", json=run)
    theirs = {"Authorization": f"Bearer {server.key('lab-b')}"}
    path = f"/v1/runs/{run['id']}"
    assert publisher.post("/v1/runs", json=run, headers=theirs).json()["code"] == "already_exists"
    assert publisher.post(f"{path}/points", json=points(*CURVE), headers=theirs).status_code == 403
    assert publisher.post(f"{path}/finish", json={"tally": tally(seconds=1.0)}, headers=theirs).status_code == 403
    assert publisher.get(path, headers=theirs).status_code == 200


def test_runs_are_listed_by_task_model_and_lab_in_pages(publisher: httpx2.Client, server: Server) -> None:
    for number in range(3):
        begin(publisher, seed=number)
    begin(publisher, task="law/loss", model_id="org/other")
    theirs = {"Authorization": f"Bearer {server.key('lab-b')}"}
    publisher.post("/v1/runs", json=new_run(), headers=theirs)

    def count(**query: str) -> int:
        return len(publisher.get("/v1/runs", params=query).json()["runs"])

    assert (count(), count(task="code/loss"), count(model="org/other"), count(lab="lab-b")) == (5, 4, 1, 1)
    first = publisher.get("/v1/runs", params={"task": "code/loss", "lab": "lab-a", "limit": 2}).json()
    assert [run["seed"] for run in first["runs"]] == [2, 1]
    assert [run["seed"] for run in publisher.get(first["next"]).json()["runs"]] == [0]
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points(*CURVE))
    page = publisher.get(f"{path}/points", params={"limit": 3}).json()
    assert [len(page["points"]), len(publisher.get(page["next"]).json()["points"])] == [3, 1]
    assert publisher.get("/v1/runs/00000000-0000-7000-8000-000000000000").json()["code"] == "run_not_found"


def test_every_write_leaves_an_audit_row(publisher: httpx2.Client, server: Server) -> None:
    path = begin(publisher)
    for _ in range(2):
        publisher.post(f"{path}/points", json=points(*CURVE))
    publisher.post(f"{path}/finish", json={"tally": tally(seconds=4.0)})
    admin = {"Authorization": f"Bearer {server.admin_key}"}
    entries = publisher.get("/v1/audit", headers=admin).json()["entries"]
    assert [entry["action"] for entry in entries[:3]] == ["run.finish", "run.append", "run.begin"]


CHANGES = [
    "UPDATE runs SET points = 0",
    "DELETE FROM runs",
    "TRUNCATE runs CASCADE",
    "UPDATE run_points SET psi = 0",
    "DELETE FROM run_points",
    "INSERT INTO run_points SELECT run_id, 9, 99, psi, gamma FROM run_points",
]


def test_a_finished_run_cannot_be_changed(publisher: httpx2.Client, database_url: str) -> None:
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points((1.0, 9.0)))
    publisher.post(f"{path}/finish", json={"tally": tally(seconds=1.0)})
    for statement in CHANGES:
        with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
            execute(database_url, statement)


# --- what cannot be right


def told(figures: dict[str, float], *hardware: str, missing: tuple[str, ...] = ()) -> Tally:
    basis = Basis.PARTIAL if missing else Basis.MEASURED
    method = Method(basis=basis, instruments=(Instrument.GIVEN,), missing=missing)
    methods = {Resource(name): method for name in figures}
    names = {str(number): name for number, name in enumerate(hardware or ["NVIDIA A100-SXM4-80GB"])}
    return Tally.model_validate({**figures, "methods": methods, "hardware": names})


def codes(given: Tally, *curve: float, **run: Any) -> set[Implausible]:
    reported = [
        ReportedPoint(step=step, psi=1.0, gamma={Resource.SECONDS: amount}) for step, amount in enumerate(curve)
    ]
    return {mark.code for mark in marks_of(NewRun.model_validate(new_run(**run)), reported, given)[0]}


HOUR = {"seconds": 3600.0, "accelerator_hours": 1.0}


@pytest.mark.parametrize(
    ("tally", "marked"),
    [
        (told(HOUR | {"energy_kwh": 0.3}), False),
        (told(HOUR | {"energy_kwh": 0.01}), True),  # an A100 idles at more than 10 W
        (told(HOUR | {"energy_kwh": 0.01}, missing=("accelerator",)), False),  # the processor's alone
        (told(HOUR | {"energy_kwh": 0.01}, "NVIDIA T4"), False),
        (told(HOUR | {"energy_kwh": 0.00005}, "unheard of"), True),  # 0.05 W
        (told(HOUR | {"energy_kwh": 0.01}, "NVIDIA A100", "AMD EPYC 7763 (64 cores)"), True),
        (told(HOUR | {"energy_kwh": 0.01}, "NVIDIA A100", "unheard of"), False),
    ],
)
def test_energy_below_the_idle_draw_of_the_device_is_marked(tally: Tally, marked: bool) -> None:
    assert (Implausible.ENERGY_BELOW_IDLE in codes(tally)) is marked


@pytest.mark.parametrize(
    ("tally", "marked"),
    [
        (told(HOUR | {"flops": 3.0e14 * 3600}), False),
        (told(HOUR | {"flops": 3.3e14 * 3600}), True),
        (told(HOUR | {"flops": 3.3e14 * 3600}, "NVIDIA H100"), False),
        (told(HOUR | {"flops": 3.3e14 * 3600}, "NVIDIA A100", "AMD EPYC 7763 (64 cores)"), True),
        (told(HOUR | {"flops": 3.3e14 * 3600}, "NVIDIA A100", "NVIDIA B300"), False),
        (told({"seconds": 1.0, "flops": 2e15}, "a processor"), True),
    ],
)
def test_flops_beyond_the_peak_of_the_device_are_marked(tally: Tally, marked: bool) -> None:
    assert (Implausible.FLOPS_BEYOND_PEAK in codes(tally)) is marked


def test_tokens_beyond_the_flops_are_marked_by_the_share_that_was_trained() -> None:
    full = told({"seconds": 1e6, "tokens": 1e6, "flops": 6e12}, "a processor")
    partial = told({"seconds": 1e6, "tokens": 1e6, "flops": 4.3e12}, "a processor")
    a_tenth = {"trained": 100_000, "parameters": 1_000_000}
    assert codes(full, parameters=1_000_000) == set()
    assert codes(partial, parameters=1_000_000) == {Implausible.TOKENS_BEYOND_FLOPS}
    assert codes(partial, parameters=1_000_000, selection=a_tenth) == set()
    last_layers = told(
        {"seconds": 1e6, "tokens": 1e6, "flops": 2.6e12}, "a processor"
    )  # as torch counts 15 % of a Llama
    assert codes(last_layers, parameters=1_000_000, selection={"trained": 150_000, "parameters": 1_000_000}) == set()
    too_few = told({"seconds": 1e6, "tokens": 1e6, "flops": 1.5e12}, "a processor")
    assert codes(too_few, parameters=1_000_000, selection=a_tenth) == {Implausible.TOKENS_BEYOND_FLOPS}


def test_sums_that_are_negative_fall_or_shrink_in_the_end_are_marked_and_kept(publisher: httpx2.Client) -> None:
    assert codes(told({"seconds": 3.0}), 1.0, 2.0, 3.0) == set()
    assert codes(told({"seconds": 3.0}), 1.0, 3.0, 2.0) == {Implausible.FALLING_GAMMA}
    assert codes(told({"seconds": 3.0}), -1.0, 2.0) == {Implausible.NEGATIVE_GAMMA}
    assert codes(told({"seconds": 1.0}), 1.0, 2.0) == {Implausible.TALLY_BELOW_CURVE}
    path = begin(publisher)
    publisher.post(f"{path}/points", json=points((-1.0, 9.0), (3.0, 8.0), (2.0, 7.0))).raise_for_status()
    finished = publisher.post(f"{path}/finish", json={"tally": tally(seconds=3.0)}).json()
    assert [mark["code"] for mark in finished["marks"]] == ["negative_gamma", "falling_gamma"]
    assert "falls from 3 to 2 at step 20" in finished["marks"][1]["detail"]


def test_a_device_is_known_by_a_word_of_its_name() -> None:
    assert accelerator_of("NVIDIA A100-SXM4-80GB") is not accelerator_of("NVIDIA A10")
    assert accelerator_of("NVIDIA A1000") is None
