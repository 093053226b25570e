"""The experiments end to end on a model of a moment's training, and the document that is made from stored runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from demo.models import random_batches
from demo.texts import code_modules
from evidence import gradients, models, plots, queue, report, runs, staleness, texts
from evidence.data import training_batches
from evidence.findings import Finding, Product, find
from evidence.hypotheses import judge_hypotheses
from evidence.plan import (
    FULL,
    PLAN,
    SERIES,
    Cell,
    at_random,
    bridged,
    by_factors,
    checked,
    library,
    linear_only,
    of_layers,
    ours,
)
from evidence.runs import Choice, Data, Result, Run, Store
from evidence.training import train
from evidence.verdicts import better_than_all, judge, memory, never_worse, within
from gradient_blueprints import Client
from gradient_blueprints.statistics_models import Verdict
from gradient_blueprints.training.data_selection import exact_influences

RUN = Run("tiny", "code", "tune", ours(0.1), 8e-3, 0, 6, 4, 32)
RESULT = Result(6.0, 4.0, 3.0, 3.5, 10, 100, 120, 40, 40, 1.0, 1.0, 0.1)


def cells(*choices: Choice) -> list[Cell]:
    return [Cell("10 %", "tiny", "code", "confirm", choice, range(2)) for choice in choices]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with little text in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "texts").mkdir()
    modules = [module for module, _ in zip(code_modules(), range(40), strict=False)]
    for domain, offset in (("code", 0), ("english", 20)):
        parts = {part: "\n".join(modules[offset + 4 * i : offset + 4 * i + 4]) for i, part in enumerate(texts.PARTS)}
        (folder / "texts" / f"{domain}.json").write_text(json.dumps({k: v[:40_000] for k, v in parts.items()}))
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> tuple[Store, list[Cell]]:
    plan = cells(
        FULL,
        ours(0.1, local=4),
        at_random(0.1),
        Choice("lora", share=0.1),
        of_layers("norm", 0.1),
        library(0.1, local=4),
        library(0.1, "code*", local=4),
        library(0.1, "", local=4),
        by_factors(0.1, "code@0.5"),
        library(0.1, "code*#", local=4),
        checked(0.1),
        linear_only(library(0.1, local=4)),
        bridged("k_star", 0.1),
    )
    store = Store(work, kept=work / "kept")
    queue.work_off(plan, store, work, report=lambda line: None)
    return store, plan


def test_the_queue_runs_every_arm_once_and_the_next_one_nothing(finished: tuple[Store, list[Cell]], work: Path) -> None:
    store, plan = finished
    assert all(len(cell.results(store)) == 2 for cell in plan)
    assert queue.work_off(plan, Store(work, kept=work / "kept"), work, report=print) == 0


@pytest.mark.parametrize("changed", [{"texts": "of another machine"}, {"base": 6.0}, {"english_base": 6.0}])
def test_what_could_not_be_compared_with_the_stored_runs_is_left_out(
    changed: dict[str, str | float], finished: tuple[Store, list[Cell]], work: Path, tmp_path: Path
) -> None:
    stored, plan = finished
    other = Store(tmp_path, kept=tmp_path / "kept")
    for run, result in stored:
        other.add(run, replace(result, **changed))  # type: ignore[arg-type]  # fields of a result
    told: list[str] = []
    more = [replace(plan[0], seeds=range(3)), replace(plan[2], seeds=range(3))]
    assert queue.work_off(more, other, work, report=told.append) == 0
    assert [line.split(",")[0] for line in told] == ["tiny on code is left out"]
    same = Store(tmp_path / "same", kept=tmp_path / "kept")
    for run, result in stored:
        same.add(run, result)
    assert queue.work_off(more[:1], same, work, report=told.append) == 1


def test_a_selection_holds_a_tenth_of_the_moments_and_gradients(finished: tuple[Store, list[Cell]]) -> None:
    store, plan = finished
    full, selected = (cell.results(store)[0] for cell in plan[:2])
    assert full.trained == full.parameters
    assert selected.trained == pytest.approx(0.1 * full.trained, rel=0.01)
    assert selected.training_bytes == pytest.approx(0.1 * full.training_bytes * 16 / 12, rel=0.02)


def test_runs_learn_and_equal_runs_are_equal(finished: tuple[Store, list[Cell]], work: Path) -> None:
    store, plan = finished
    run = (plan[0].runs(store) or [])[0]
    known = store.get(run)
    assert known is not None
    assert known.loss < known.base - 0.1
    again = train(models.load("tiny", work), run)
    assert again.loss == pytest.approx(known.loss, abs=1e-6)


def test_a_run_tells_the_verdict_of_its_staleness_check(finished: tuple[Store, list[Cell]]) -> None:
    store, plan = finished
    for cell in plan:
        verdicts = {result.verdict for result in cell.results(store).values()}
        assert verdicts <= set(Verdict) if cell.choice == checked(0.1) else verdicts == {""}


def test_a_staleness_check_is_the_registry_s(work: Path, admin: Client) -> None:
    subject = models.load("tiny", work)
    published, _ = gradients.published_profile(subject, "code@0.5", 16, 32, 0)
    sample = gradients.local_sample(subject, "code", 32, 32, 0)
    admin.publish_blueprint(published)
    there = admin.check_staleness("tiny", 1.0, staleness.norms_by_batch(subject, sample, "code"))
    assert staleness.check_staleness(subject, published, sample, "code").levels == there.levels
    assert there.agreement.interval_method == "bootstrap_over_batches"


def test_what_is_drawn_anew_differs_between_seeds_and_nothing_else_does(work: Path) -> None:
    subject = models.load("tiny", work)
    name = "model.layers.0.mlp.up_proj.weight"

    def rows(published: str, seed: int) -> list[float]:
        found = gradients.published_factors(subject, published, 16, 32, seed)
        profiled = gradients.published_profile(subject, published, 16, 32, seed)[1][f"code/{name}/row"]
        if "*" not in published:  # the two permute by names of their own
            assert np.allclose(found.row[name], profiled.numpy(), rtol=1e-4)
        return [float(value) for value in found.row[name]]

    assert rows("code", 0) == rows("code", 1) != rows("code@0.5", 0) == rows("code@0.5", 1)
    assert rows("code#", 0) == rows("code#", 0) != rows("code#", 1) != rows("code", 0)
    permuted = [rows("code*#", seed) for seed in range(2)] + [rows("code*", seed) for seed in range(2)]
    assert permuted[0] != permuted[1] != permuted[2] == permuted[3]
    assert all(sorted(each) == sorted(rows("code", 0)) for each in permuted)


def test_older_factors_are_of_the_older_weights(work: Path) -> None:
    subject = models.load("tiny", work)
    older = models.Subject("tiny", subject.at(0.5).model, subject.tokenizer, work)
    _, of_older = gradients.published_profile(subject, "code@0.5", 16, 32, 0)
    batches = list(random_batches(subject.tokens("code", "published"), 2, 8, 32, 1))
    _, profiled = gradients.profile(older, batches, "code")
    assert all(torch.equal(profiled[key], each) for key, each in of_older.items())


def test_repeated_runs_are_held_against_what_was_kept(
    finished: tuple[Store, list[Cell]], work: Path, tmp_path: Path
) -> None:
    _, plan = finished
    lines = [json.loads(line) for line in (work / "runs" / "tiny.jsonl").read_text().splitlines()]
    for line in lines:
        if (line["run"]["purpose"], line["run"]["seed"]) == ("confirm", 1):
            line["result"]["loss"] += 0.5
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = list(queue.repeat(plan, Store(kept=tmp_path), 5, work))
    off = {line.split(": ")[0]: float(line.split(", ")[-2]) for line in told}
    assert {round(each, 5) for name, each in off.items() if name.endswith(" seed 1")} == {-0.5}
    assert {round(each, 5) for name, each in off.items() if name.endswith(" seed 0")} == {0.0}
    assert len(off) == 5


def test_a_finding_is_a_share_of_what_full_fine_tuning_gained(finished: tuple[Store, list[Cell]]) -> None:
    store, plan = finished
    full, lora = find(plan[0], plan, store), find(plan[3], plan, store)
    assert full is not None
    assert lora is not None
    assert full.share == 1
    gains = [(lora.results[seed].gain, full.results[seed].gain) for seed in (0, 1)]
    assert lora.share == pytest.approx(sum(few / all_of_it for few, all_of_it in gains) / 2)


def test_a_bridged_adapter_has_no_more_parameters_than_one_of_equal_ranks(finished: tuple[Store, list[Cell]]) -> None:
    store, plan = finished
    trained = {cell.choice.arm: cell.results(store)[0].trained for cell in plan}
    assert 0.9 * trained["lora"] < trained["bridged"] <= trained["lora"]


@pytest.mark.parametrize("data", [each for each in get_args(Data) if each != "random"])
def test_chosen_data_are_a_part_of_the_whole_pass_in_its_order(data: Data, work: Path) -> None:
    subject = models.load("tiny", work)
    rows, chosen = _rows(subject, RUN), _rows(subject, replace(RUN, steps=2, data=data))
    assert len(rows) == 6 * 4
    assert len(chosen) == 2 * 4
    places = [rows.index(row) for row in chosen]
    assert places == sorted(set(places))
    if data == "influence":
        batch = torch.tensor(rows)
        norms = exact_influences(subject.fresh(), [{"input_ids": batch, "labels": batch}])
        assert norms[places].min() > np.delete(norms, places).max()


def _rows(subject: models.Subject, run: Run) -> list[list[int]]:
    return [row for batch in training_batches(subject, run) for row in batch["input_ids"].tolist()]


def test_a_product_is_of_one_seed_s_parts(finished: tuple[Store, list[Cell]]) -> None:
    _, plan = finished
    parts = [replace(finding(*shares), cell=plan[0]) for shares in ((0.9, 0.8), (0.5, 0.6), (0.4, 0.5))]
    found = Product(*parts)
    assert found.multiplied == pytest.approx({0: 0.45, 1: 0.48})
    assert found.added == pytest.approx({0: 0.4, 1: 0.4})


def finding(*shares: float, first_seed: int = 0) -> Finding:
    by_seed = {first_seed + i: share for i, share in enumerate(shares)}
    return Finding(cells(ours(0.1))[0], 1e-3, dict.fromkeys(by_seed, RESULT), by_seed)


def test_a_verdict_is_decided_by_the_whole_interval() -> None:
    rival = finding(0.90, 0.91, 0.92, 0.93)
    ahead, behind = finding(0.95, 0.955, 0.975, 0.98), finding(0.85, 0.855, 0.875, 0.88)
    assert within("", "tiny", ahead, rival).verdict == "holds"
    assert within("", "tiny", behind, rival).verdict == "does not hold"
    assert within("", "tiny", finding(0.8, 1.0, 0.9, 1.1), rival).verdict == "undecided"
    assert within("", "tiny", ahead, rival, -0.1, 0.1).verdict == "holds"
    assert within("", "tiny", ahead, rival, -0.1, 0.01).verdict == "does not hold"
    assert within("", "tiny", None, rival).verdict == "not run yet"


def test_never_worse_is_refuted_by_one_case_and_held_by_all() -> None:
    low, even, high = finding(0.7, 0.71, 0.7), finding(0.9, 1.1, 0.95), finding(1.3, 1.31, 1.3)
    rival = finding(1.0, 1.0, 1.0)
    noisy = finding(0.2, 1.1, 0.3)  # the lowest mean, and not worse for certain
    assert never_worse("", "tiny", [(noisy, rival), (low, rival)]).verdict == "does not hold"
    assert never_worse("", "tiny", [(noisy, rival), (low, rival)]).why.startswith("worse in 1 of 2 cases; ")
    assert never_worse("", "tiny", [(high, rival), (even, rival)]).verdict == "undecided"
    assert never_worse("", "tiny", [(high, rival)]).verdict == "holds"
    assert never_worse("", "tiny", [(high, rival), (None, rival)]).verdict == "undecided"
    assert never_worse("", "tiny", [(None, rival)]).verdict == "not run yet"
    assert never_worse("", "tiny", [(even, rival)], 0.5).verdict == "holds"
    assert never_worse("", "tiny", [(low, rival)], 0.1).why.startswith("worse by more than 10 points in 1 of 1 cases; ")


def test_a_rival_that_is_ahead_refutes_and_one_that_is_not_run_leaves_it_open() -> None:
    mine, low, high = finding(1.0, 1.01, 1.02), finding(0.5, 0.51, 0.52), finding(1.5, 1.51, 1.52)

    def verdict(*rivals: Finding, planned: int) -> str:
        return better_than_all("", "tiny", mine, rivals, planned).verdict

    assert verdict(low, planned=1) == "holds"
    assert verdict(low, planned=2) == "undecided"
    assert verdict(low, finding(1.0, 1.02, 1.01), planned=2) == "undecided"
    assert verdict(low, high, planned=3) == "does not hold"
    assert verdict(planned=1) == "not run yet"


@pytest.mark.parametrize(
    ("largest", "held", "verdict"),
    [
        (20, 1_000, "holds"),  # ranking the largest tensor of 20 beside a float32 sample takes 4,240 of 16,160 bytes
        (200, 1_000, "holds with the sample in bfloat16, not in float32"),  # 4,400 and 6,400 of 17,600
        (1_000, 100, "does not hold"),  # 14,000 of 24,000
        (20, 5_400, "does not hold"),  # the training alone
    ],
)
def test_memory_is_judged_at_the_worst_moment(largest: int, held: int, verdict: str) -> None:
    """Of a model of 1,000 parameters, and of full fine-tuning's 16 bytes for each."""

    def holding(optimizer: int) -> Finding:
        result = replace(RESULT, parameters=1_000, optimizer_bytes=optimizer, gradient_bytes=0)
        return replace(finding(1.0), results={0: replace(result, largest_gradient_bytes=4 * largest)})

    assert memory("tiny", holding(held), holding(16_000)).verdict == verdict
    assert memory("tiny", None, holding(16_000)).verdict == "not run yet"


def test_added_seeds_are_judged_alone_too() -> None:
    mine, rival = finding(0.9, 0.9, 0.95, 0.96), finding(0.9, 0.9, 0.90, 0.90)
    assert "4 seeds; the 2 later alone +5.5 [" in within("", "tiny", mine, rival).why
    even, ahead = finding(0.9, 0.9, 0.9, 0.9), finding(0.95, 0.96, 0.94, 0.97)
    assert within("", "tiny", ahead, even).verdict == "holds; the later seeds alone: undecided"


def test_new_runs_are_kept_once(finished: tuple[Store, list[Cell]], work: Path) -> None:
    store, _ = finished
    store.keep()
    store.keep()
    lines = (work / "kept" / "tiny.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == len(list(store))


def test_a_line_torn_off_by_a_crash_is_no_run(tmp_path: Path) -> None:
    store = Store(tmp_path, kept=tmp_path / "kept")
    store.add(RUN, RESULT)
    with (tmp_path / "runs" / "tiny.jsonl").open("a") as file:
        file.write('{"key": "torn')
    assert Store(tmp_path, kept=tmp_path / "kept").get(RUN) == RESULT


def test_a_run_that_another_process_is_at_is_not_free(tmp_path: Path) -> None:
    first, second = Store(tmp_path, kept=tmp_path / "kept"), Store(tmp_path, kept=tmp_path / "kept")
    with first.claim(RUN) as free, second.claim(RUN) as also:
        assert (free, also) == (True, False)
    with second.claim(RUN) as free:
        assert free


def test_everything_that_a_run_depends_on_is_in_its_key() -> None:
    others = [replace(RUN, seed=1), replace(RUN, steps=7), replace(RUN, choice=replace(RUN.choice, local=8))]
    others += [replace(RUN, schedule="constant"), replace(RUN, data="similar")]
    assert len({run.key for run in [RUN, *others]}) == 6


def test_runs_keep_the_keys_that_they_were_stored_with() -> None:
    lines = [json.loads(line) for line in (runs.RUNS / "gpt.jsonl").read_text().splitlines()]
    store = Store(kept=runs.RUNS)
    assert {line["key"] for line in lines} <= {run.key for run, _ in store}


def test_documents_are_dealt_whole_and_to_one_part_only() -> None:
    documents = [f"document {i}" for i in range(300)]
    parts = texts.deal(documents * 2)
    found = [set(text.split("\n\n")) for text in parts.values()]
    assert sum(map(len, found)) == 300
    assert all(found)


def test_the_document_is_what_the_stored_runs_say() -> None:
    drawn = [name for name in plots.NAMES if (report.DOCUMENT.parent / "evidence" / name).is_file()]
    assert report.DOCUMENT.read_text() == report.render(Store(kept=runs.RUNS), drawn)


def test_a_goal_of_which_nothing_was_run_is_not_judged(tmp_path: Path) -> None:
    empty = Store(tmp_path, kept=tmp_path / "kept")
    for judged in (judge, judge_hypotheses):
        assert {verdict.verdict for verdict in judged("gpt", PLAN, empty)} == {"not run yet"}
    assert {verdict.verdict for verdict in judge_hypotheses(SERIES, PLAN, empty)} == {"not run yet"}


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    assert plots.draw([], Store(tmp_path, kept=tmp_path / "kept"), tmp_path) == []
