"""Selection over HTTP: Algorithm 1 from posted norms, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.documents import blueprint_document

PATH = "/v1/models/tiny/checkpoints/0.8/selection"
SIZES = {"head": 90, "x": 50, "y": 10}
NORMS = {"head": 6.0, "x": 5.0, "y": 1.0}


def publish(http: httpx2.Client, norms: dict[str, float] = NORMS, **fields: dict[str, Any]) -> None:
    layers = [
        {"id": name, "gradient_norm": norm, "parameters": SIZES.get(name, 1)}
        | {field: values[name] for field, values in fields.items()}
        for name, norm in norms.items()
    ]
    http.post("/v1/blueprints", json=blueprint_document() | {"layers": layers}).raise_for_status()


def local(norms: dict[str, float], statistic: str = "gradient_norm") -> dict[str, Any]:
    return {"statistic": statistic, "layers": [{"id": name, "value": norm} for name, norm in norms.items()]}


def ask(http: httpx2.Client, amount: float, measure: str = "parameters", **options: Any) -> dict[str, Any]:
    body = {"budget": {"amount": amount, "measure": measure}} | options
    return dict(http.post(PATH, json=body).raise_for_status().json())


def fractions(answer: dict[str, Any]) -> dict[str, float]:
    return {layer["id"]: layer["fraction"] for layer in answer["layers"]}


def shares(answer: dict[str, Any]) -> dict[str, float]:
    return {layer["id"]: round(layer["share"], 6) for layer in answer["layers"]}


def test_whole_layers_are_chosen_by_value_within_the_bytes(publisher: httpx2.Client) -> None:
    publish(publisher)
    answer = ask(publisher, 100 * 12, "bytes", unit="layer")
    assert fractions(answer) == {"head": 1, "x": 0, "y": 1}  # greedy by density takes x and y
    assert (answer["selected"], answer["training_bytes"], answer["full_bytes"]) == (100, 1200, 1800)
    assert (answer["exact"], answer["trust"], answer["version"], answer["lab"]) == (True, 1, 1, "lab-a")


def test_every_layer_gets_a_fraction_and_more_where_its_k_star_is_larger(publisher: httpx2.Client) -> None:
    publish(publisher)
    assert fractions(ask(publisher, 0.1, "fraction")) == pytest.approx(dict.fromkeys(SIZES, 0.1))
    publish(publisher, k_star={"head": 0.4, "x": 0.2, "y": 0.2})
    uneven = fractions(ask(publisher, 0.1, "fraction"))
    assert uneven["head"] == pytest.approx(2 * uneven["x"])
    beside_a_sample = ask(publisher, 0.1, "fraction", local=local(NORMS), trust=0.0)  # norms alone say no k_star
    assert fractions(beside_a_sample) == pytest.approx(dict.fromkeys(SIZES, 0.1))


def test_local_norms_are_blended_as_shares(publisher: httpx2.Client) -> None:
    publish(publisher, {"head": 3.0, "x": 1.0, "y": 1.0})
    theirs = local({"head": 100.0, "x": 300.0, "y": 100.0})
    assert shares(ask(publisher, 0.1, "fraction", local=theirs, trust=0.25)) == {"head": 0.3, "x": 0.5, "y": 0.2}


def test_trust_comes_from_agreement_and_the_intervals_of_batches(publisher: httpx2.Client) -> None:
    narrow = {name: [0.95 * norm, 1.05 * norm] for name, norm in NORMS.items()}
    publish(publisher, gradient_norm_ci=narrow)
    generator = np.random.default_rng(0)

    def batches(noise: float) -> dict[str, Any]:
        values = {name: norm * np.exp(noise * generator.standard_normal(8)) for name, norm in NORMS.items()}
        return {"layers": [{"id": name, "batches": given.tolist()} for name, given in values.items()]}

    noisy, quiet = (ask(publisher, 0.1, "fraction", local=batches(noise))["trust"] for noise in (0.3, 0.001))
    assert noisy > 0.7
    assert quiet < 0.1
    against = local({"head": 1.0, "x": 2.0, "y": 3.0})
    assert ask(publisher, 0.1, "fraction", local=against)["trust"] == 0


def test_batches_tell_the_noise_of_a_value_on_another_scale(publisher: httpx2.Client) -> None:
    publish(publisher, gradient_norm_ci={name: [0.95 * norm, 1.05 * norm] for name, norm in NORMS.items()})

    def trust(unit: float) -> float:
        layers = [
            {"id": name, "value": norm, "batches": [unit * norm * share for share in (0.8, 0.9, 1.1, 1.2)]}
            for name, norm in NORMS.items()
        ]
        return float(ask(publisher, 0.1, "fraction", local={"layers": layers})["trust"])

    assert trust(100.0) == pytest.approx(trust(1.0))


@pytest.mark.parametrize("batches", [[1.7e308] * 4, [1.7e308, 0, 1.7e308]])
def test_batches_whose_sum_leaves_float64_have_a_mean(publisher: httpx2.Client, batches: list[float]) -> None:
    publish(publisher, gradient_norm_ci={name: [0.9 * norm, 1.1 * norm] for name, norm in NORMS.items()})
    layers = [
        {"id": name, "batches": batches if name == "x" else [norm] * len(batches)} for name, norm in NORMS.items()
    ]
    assert shares(ask(publisher, 0.1, "fraction", local={"layers": layers}, trust=0.0)) == {"head": 0, "x": 1, "y": 0}
    assert 0 <= ask(publisher, 0.1, "fraction", local={"layers": layers})["trust"] <= 1


def test_a_stale_blueprint_has_no_say(publisher: httpx2.Client) -> None:
    publish(publisher)
    answer = ask(publisher, 0.1, "fraction", verdict="stale")
    assert answer["trust"] == 0
    assert shares(answer) == {name: round(size / 150, 6) for name, size in SIZES.items()}
    assert ask(publisher, 0.1, "fraction", verdict="stale", trust=0.8)["trust"] == 0
    groups = {"all": list(SIZES)}
    assert ask(publisher, 0.1, "fraction", verdict="stale", groups=groups)["trust"] == 1


@pytest.mark.parametrize("scale", [1e-323, 1e-200, 1.0, 1e154, 2.5e307])
def test_norms_of_any_size_are_shared_alike(publisher: httpx2.Client, scale: float) -> None:
    """Squares of norms from 1.4e154 on, and the sum of the last ones, are beyond what a float holds."""
    publish(publisher, {name: norm * scale for name, norm in NORMS.items()})
    assert shares(ask(publisher, 0.1, "fraction")) == {"head": 0.5, "x": 0.416667, "y": 0.083333}
    group = shares(ask(publisher, 0.1, "fraction", groups={"body": ["x", "y"]}))
    assert group["head"] == pytest.approx(6 / (6 + 26**0.5 * ((5 / 6) ** 0.5 + (1 / 6) ** 0.5)), abs=1e-6)
    theirs = local({name: norm * 2.5e307 for name, norm in NORMS.items()})
    assert shares(ask(publisher, 0.1, "fraction", local=theirs)) == {"head": 0.5, "x": 0.416667, "y": 0.083333}


def test_an_interval_of_any_width_is_a_doubt(publisher: httpx2.Client) -> None:
    intervals = {name: [0.0, 1.0] for name in SIZES}
    publish(publisher, {"head": 3e-320, "x": 2e-320, "y": 1e-320}, gradient_norm_ci=intervals)
    told = [{"id": name, "value": norm, "interval": [0.0, 1e300]} for name, norm in NORMS.items()]
    assert ask(publisher, 0.1, "fraction", local={"layers": told})["trust"] == pytest.approx(1 / 26)


def test_criteria_are_those_of_the_document(publisher: httpx2.Client) -> None:
    publish(publisher, first_order={"head": -1.0, "x": 3.0, "y": 1.0}, signal={"head": 1.0, "x": 1.0, "y": 2.0})
    assert shares(ask(publisher, 0.1, "fraction", criterion="first_order")) == {"head": 0, "x": 0.75, "y": 0.25}
    signal = ask(
        publisher, 0.1, "fraction", criterion="signal", local=local(dict.fromkeys(SIZES, 1.0), "signal"), trust=1.0
    )
    assert shares(signal) == {"head": 0.25, "x": 0.25, "y": 0.5}
    publish(publisher)
    assert publisher.post(PATH, json={"budget": {"amount": 0.1}, "criterion": "signal"}).status_code == 422


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"budget": {"amount": 0}},
        {"budget": {"amount": 1.5}},
        {"budget": {"amount": 0.1}, "unit": "neuron"},
        {"budget": {"amount": 0.1}, "criterion": "absolute"},
        {"budget": {"amount": 0.1}, "trust": 2},
        {"budget": {"amount": 0.1}, "criterion": "signal", "local": local(NORMS)},
        {"budget": {"amount": 0.1}, "criterion": "first_order", "local": local(NORMS)},
        {"budget": {"amount": 0.1}, "local": local({"another": 1.0})},
        {"budget": {"amount": 0.1}, "local": {"layers": [{"id": "x", "value": 1.0, "parameters": 2**60}]}},
    ],
)
def test_what_cannot_be_answered_is_refused(publisher: httpx2.Client, body: dict[str, Any]) -> None:
    publish(publisher, signal=NORMS, first_order=NORMS)
    assert publisher.post(PATH, json=body).status_code == 422


@pytest.mark.parametrize(
    ("amount", "measure", "options", "least"),
    [
        (1e-6, "fraction", {}, 2),  # 2 of 150 parameters, 90 of them in the head: 1.2
        (0.1, "parameters", {}, 2),
        (3, "bytes", {}, 2),
        (0.5, "parameters", {"unit": "layer"}, 10),
        (9, "parameters", {"unit": "layer"}, 10),
        (0.1, "parameters", {"criterion": "first_order", "unit": "layer"}, 90),  # y is worth nothing
    ],
)
def test_a_budget_that_pays_for_nothing_is_refused_with_the_least_that_does(
    publisher: httpx2.Client, amount: float, measure: str, options: dict[str, str], least: int
) -> None:
    publish(publisher, first_order={"head": 1.0, "x": 0.0, "y": -1.0})
    refused = publisher.post(PATH, json={"budget": {"amount": amount, "measure": measure}} | options)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    what = options.get("unit", "coordinate")
    assert f"does not pay for one {what} anywhere: the least that does is {least} " in refused.json()["detail"]
    assert ask(publisher, least, **options)["selected"] > 0
    below = {"budget": {"amount": least - 1, "measure": "parameters"}} | options
    assert publisher.post(PATH, json=below).status_code == 422


def test_layers_without_parameters_are_refused(publisher: httpx2.Client) -> None:
    layers = [{"id": "x", "gradient_norm": 1.0, "parameters": 0}]
    publisher.post("/v1/blueprints", json=blueprint_document() | {"layers": layers}).raise_for_status()
    for unit in ("coordinate", "layer"):
        refused = publisher.post(PATH, json={"budget": {"amount": 0.1}, "unit": unit})
        assert (refused.status_code, "hold no parameters" in refused.json()["detail"]) == (422, True)


def test_unknown_sizes_are_taken_from_the_local_side_or_asked_for(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=blueprint_document(layers=1)).raise_for_status()
    (name,) = (layer["id"] for layer in blueprint_document(layers=1)["layers"])
    refused = publisher.post(PATH, json={"budget": {"amount": 0.1}})
    assert (refused.status_code, name in refused.json()["detail"]) == (422, True)
    counted = {"layers": [{"id": name, "value": 1.0, "parameters": 200}]}
    assert ask(publisher, 0.1, "fraction", local=counted)["selected"] == 20


def test_sizes_made_to_be_hard_are_answered_in_time_and_said_to_be_inexact(publisher: httpx2.Client) -> None:
    """Sizes equal to their values, all odd, an even capacity: no bound ever prunes."""
    generator = np.random.default_rng(0)
    sizes = (2 * generator.integers(2**40, 2**41, 400) + 1).tolist()
    layers = [{"id": f"layer.{i}", "gradient_norm": size, "parameters": size} for i, size in enumerate(sizes)]
    publisher.post("/v1/blueprints", json=blueprint_document() | {"layers": layers}).raise_for_status()
    started = time.monotonic()
    answer = ask(publisher, sum(sizes) // 4 * 2, unit="layer")
    assert time.monotonic() - started < 30
    assert not answer["exact"]
    assert answer["selected"] > 0.999 * (sum(sizes) // 2 - 1)
