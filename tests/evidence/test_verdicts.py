"""Goals and claims, judged on runs whose truth is made up: that each row looks at the arms it speaks of."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from evidence.findings import at_constant_rate
from evidence.overview import overview
from evidence.plan import FULL, PLAN, at_random, by_factors, by_local, library, of_layers, ours, pending
from evidence.runs import Data, Result, Run, Store
from evidence.tuning import rate
from evidence.verdicts import judge, judge_claims

MODEL = "gpt"
STAGES = ("10 %", "1 %", "25 %", "schedule", "parameters × data", "metered", "ablation")
CELLS = [cell for cell in PLAN if (cell.model, cell.domain) == (MODEL, "code") and cell.stage in STAGES]
OF_DATA: dict[Data, float] = {"random": 0.90, "predicted": 0.86, "influence": 0.85, "similar": 0.95}
SHARES = {
    ours(0.1): 0.98,
    ours(0.01): 0.70,
    ours(0.2): 0.99,
    at_random(0.1): 0.95,
    at_random(0.01): 0.80,
    by_factors(0.1): 0.94,
    by_local(0.1): 0.96,
    by_factors(0.1, "english"): 0.90,
    library(0.1): 0.96,
    library(0.01): 0.90,
    of_layers("norm", 0.1): 0.50,
    of_layers("random", 0.1): 0.60,
}


def share_of(run: Run) -> float:
    """Of full fine-tuning's gain of 2 nats; a tenth less for each factor of 2 that the rate is off."""
    share = 1.0 if run.choice == FULL else SHARES.get(run.choice, 0.5)
    if run.schedule == "constant" and run.choice == ours(0.1):
        share = 0.90
    if run.steps == _few():
        share *= OF_DATA[run.data]
    off = 1.0 if run.rate == rate(2) else 0.9
    return share * off


def _few() -> int:
    (few,) = {cell.steps for cell in CELLS if cell.steps is not None}
    return few


def make(run: Run) -> Result:
    noise = random.Random(run.key).gauss(0, 1e-3)
    whole = run.choice == FULL
    return Result(
        base=6.0,
        loss=6.0 - 2 * share_of(run) + noise,
        english_base=3.0,
        english=3.5,
        trained=100,
        parameters=1_000,
        optimizer_bytes=8_000 if whole else 800,
        gradient_bytes=4_000 if whole else 400,
        largest_gradient_bytes=40,
        seconds=1.0,
        cpu_seconds=(10.0 + noise) * (1.0 if whole else 0.5) * (0.1 if run.data == "predicted" else 1.0),
        selection_cpu_seconds=0.01,
        spent={"seconds": 1.0} if run.purpose == "meter" else None,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every run of the cells."""
    folder: Path = tmp_path_factory.mktemp("store")
    store = Store(folder, kept=folder / "kept")
    while runs := list(pending(CELLS, store)):
        for run in runs:
            store.add(run, make(run))
    return store


@pytest.fixture(scope="module")
def verdicts(store: Store) -> Callable[[str], str]:
    """The verdict of the one row that begins so."""
    constant = at_constant_rate(MODEL, CELLS, store)
    assert constant[ours(0.1)].share == pytest.approx(0.90, abs=0.01)
    found = [*judge(MODEL, CELLS, store), *judge_claims(MODEL, CELLS, store)]

    def of(beginning: str) -> str:
        (verdict,) = (each for each in found if each.goal.startswith(beginning))
        return verdict.verdict

    return of


@pytest.mark.parametrize(
    ("beginning", "verdict"),
    [
        ("at 10 % of the coordinates, at least 97 %", "holds"),
        ("at 1 %, at least 75 %", "does not hold"),
        ("at 25 %, no worse", "does not hold"),
        ("published factors alone, at 10 %, at least 93 %", "holds"),
        ("`select` of the library, at 10 %, at least 97 %", "does not hold"),
        ("`select` of the library, at 1 %, at least 75 %", "holds"),
        ("at 10 %, at least 97 %, both at a constant rate", "does not hold"),
        ("blended, at 10 % and 32 local sequences, never worse than chance", "holds"),
        ("a tenth of the parameters gets nearly all", "holds"),
        ("submodules with a large gradient norm", "does not hold"),
        ("within layers the gradient tells what to train: at 1 %", "does not hold"),
        ("the same at 10 %", "holds"),
        ("a published blueprint spares the local gradients", "does not hold"),
        ("the right domain's factors alone, ahead of published english, at 10%", "holds"),
        ("a partial update is cheaper", "holds"),
        ("data by gradient: 30 % by Algorithm 2 ahead of any 30 %", "does not hold"),
        ("30 % of the data by Algorithm 2 retains 90 %", "does not hold"),
        ("and with 20 % of the parameters 72 %", "holds"),
        ("and that at 6 % of the resource cost", "does not hold"),
        ("legal text: at 10 % of the coordinates", "not run yet"),
    ],
)
def test_each_row_is_of_the_arms_that_it_names(beginning: str, verdict: str, verdicts: Callable[[str], str]) -> None:
    assert verdicts(beginning) == verdict


def test_the_overview_has_each_arm_in_its_column_and_counts_every_verdict(store: Store) -> None:
    verdicts = judge(MODEL, CELLS, store)
    parts = overview((MODEL,), {"goals": verdicts}, CELLS, store)
    rows = [line.split(" | ") for part in parts for line in part.splitlines()]
    (head,) = (row for row in rows if row[0] == "| Trained")
    (mine,) = (row for row in rows if row[0] == "| ours: largest by factors and local sample")
    (random_layers,) = (row for row in rows if row[0] == "| whole layers at random")
    assert [each.strip(" |") for each in head[1:]] == ["code, 1 %", "code, 10 %", "code, 25 %"]
    assert [float(each.split(" %")[0]) for each in mine[1:]] == pytest.approx([70, 98, 50], abs=0.2)
    assert float(random_layers[2].split(" %")[0]) == pytest.approx(60, abs=0.2)
    (goals,) = (row for row in rows if row[0] == "| goals")
    judged = [each.verdict for each in verdicts]
    assert sum(int(each.strip(" |")) for each in goals[2:]) == len(judged)
    assert int(goals[2]) == sum(each.startswith("holds") for each in judged)
