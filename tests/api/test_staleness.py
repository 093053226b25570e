"""Checks over HTTP: verdicts, coarser levels, what does not match, and evidence that nobody can flood."""

from __future__ import annotations

import math
from typing import Any

import asyncpg
import httpx2
import numpy as np
import pytest

from gradient_blueprints.statistics_models import DEFAULT_THRESHOLD
from tests.conftest import Server, execute
from tests.documents import blueprint_document

PATH = "/v1/models/tiny/checkpoints/0.8/staleness"
KINDS = ("attention", "feed_forward", "normalization")
NAMES = [f"blocks.{depth}.{kind}" for depth in range(8) for kind in KINDS]
NORMS = dict(zip(NAMES, np.exp(np.random.default_rng(0).standard_normal(24)).tolist(), strict=True))


def published(norms: dict[str, float] = NORMS, **fields: Any) -> dict[str, Any]:
    return blueprint_document() | {
        "layers": [
            {"id": name, "gradient_norm": norm} | {key: value(norm) for key, value in fields.items()}
            for name, norm in norms.items()
        ]
    }


def local(norms: dict[str, float] = NORMS, *, noise: float = 0.1, batches: int = 12, seed: int = 1) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "layers": [
            {"id": name, "batches": (norm * np.exp(noise * generator.standard_normal(batches))).tolist()}
            for name, norm in norms.items()
        ]
    }


def other_norms(seed: int = 9) -> dict[str, float]:
    return dict(zip(NAMES, np.exp(np.random.default_rng(seed).standard_normal(24)).tolist(), strict=True))


def check(http: httpx2.Client, sample: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    body = ({"local": sample} if sample is not None else {}) | options
    return dict(http.post(PATH, json=body).raise_for_status().json())


def test_a_sample_of_a_domain_is_held_against_the_published_norms_of_that_domain(publisher: httpx2.Client) -> None:
    of_code = other_norms()
    document = published()
    for layer in document["layers"]:
        layer["domain_norms"] = {"code": of_code[layer["id"]], "general": layer["gradient_norm"]}
    del document["layers"][3]["domain_norms"]["general"]
    document["layers"][3]["domain_norms"]["prose"] = 1.0
    digest = publisher.post("/v1/blueprints", json=document).json()["digest"]
    told = {}
    for domain in ("code", "general", "prose", "cod"):
        answer = check(publisher, local(of_code), domain=domain)
        told[domain] = answer["published_domain"], answer["verdict"]
    assert told["code"] == ("code", "fresh")
    assert told["general"] == told["prose"] == told["cod"] == ("general", "stale")  # not of every layer, not at all
    assert check(publisher, local(), domain="general")["verdict"] == "fresh"
    itself = check(publisher, digest=digest, domain="code")
    assert (itself["published_domain"], itself["statistic"], itself["levels"][0]["spearman"]) == (
        "code",
        "gradient_norm",
        1.0,
    )


def test_a_blueprint_is_fresh_where_the_local_batches_follow_it(publisher: httpx2.Client) -> None:
    digest = publisher.post("/v1/blueprints", json=published()).json()["digest"]
    answer = check(publisher, local(), top=3)
    assert (answer["verdict"], answer["advice"], answer["level"]) == ("fresh", "use", "layer")
    assert (answer["digest"], answer["version"], answer["lab"], answer["matched"]) == (digest, 1, "lab-a", 24)
    assert (answer["top"], answer["top_overlap"], answer["top_by_chance"]) == (3, 1.0, 0.125)
    assert answer["rank_biased_overlap"] > 0.9
    (level,) = answer["levels"]
    assert level["interval_method"] == "bootstrap_over_batches"
    for name in ("spearman", "kendall", "corrected"):
        low, high = level[f"{name}_ci"]
        assert low <= level[name] <= high
    assert level["ceiling"] > 0.9
    assert check(publisher, local(), top=3) == answer


def test_a_blueprint_of_other_ranks_is_stale_and_wants_a_refresh(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    answer = check(publisher, local(other_norms()))
    assert (answer["verdict"], answer["advice"]) == ("stale", "refresh")
    assert "level" not in answer
    assert [level["level"] for level in answer["levels"]] == ["layer", "kind_in_depth_band", "kind", "depth_band"]


def test_ranks_that_hold_only_between_bands_of_depth_are_used_at_that_level(publisher: httpx2.Client) -> None:
    """Within a band the kinds are shuffled; the bands keep their order."""
    norms = {name: 10.0 ** (index // 3) * (1 + index % 3) for index, name in enumerate(NAMES)}
    flat = {name: 3.0 + 0.1 * (index % 3) + 0.01 * (index // 3) for index, name in enumerate(NAMES)}
    shuffled = {name: flat[NAMES[3 * (index // 3) + (index + 1) % 3]] for index, name in enumerate(NAMES)}
    publisher.post("/v1/blueprints", json=published(flat))
    answer = check(publisher, local(shuffled, noise=1e-5))
    assert (answer["verdict"], answer["advice"], answer["level"]) == ("stale", "coarsen", "depth_band")
    assert len(answer["groups"]) == 8
    assert answer["groups"]["band 1 of 8"] == NAMES[:3]
    publisher.post("/v1/blueprints", json=published(norms))
    assert check(publisher, local(norms))["level"] == "layer"


def test_another_blueprint_is_judged_with_the_intervals_of_both(publisher: httpx2.Client) -> None:
    with_ci: dict[str, Any] = {"gradient_norm_ci": lambda norm: [0.95 * norm, norm / 0.95]}
    publisher.post("/v1/blueprints", json=published(**with_ci))
    same = {name: norm * 1.01 for name, norm in NORMS.items()}
    later = publisher.post("/v1/blueprints", json=published(same, **with_ci) | {"training_checkpoint": 1.0})
    answer = check(publisher, digest=later.json()["digest"])
    assert answer["verdict"] == "fresh"
    assert answer["other_digest"] == later.json()["digest"]
    assert answer["levels"][0]["interval_method"] == "bootstrap_from_intervals"


def test_the_signal_is_compared_with_the_signal(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published(signal=lambda norm: 1 / norm))
    inverse = {name: 1 / norm for name, norm in NORMS.items()}
    assert check(publisher, local(inverse) | {"statistic": "signal"})["verdict"] == "fresh"
    assert check(publisher, local(inverse))["verdict"] == "stale"


def test_a_statistic_that_was_not_published_is_refused(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    refused = publisher.post(PATH, json={"local": local() | {"statistic": "signal"}})
    assert refused.status_code == 422
    assert "gradient_norm" in refused.json()["detail"]


def test_a_value_beside_batches_is_the_estimate_and_the_batches_tell_its_noise(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    reverse = dict(zip(sorted(NAMES, key=lambda name: NORMS[name]), sorted(NORMS.values(), reverse=True), strict=True))

    def judged(values: dict[str, float], batches: dict[str, float]) -> dict[str, Any]:
        layers = [layer | {"value": values[layer["id"]]} for layer in local(batches)["layers"]]
        return dict(check(publisher, {"layers": layers})["levels"][0])

    following, opposed = judged(NORMS, reverse), judged(reverse, NORMS)
    assert (following["spearman"], opposed["spearman"]) == (1, -1)
    assert following["interval_method"] == opposed["interval_method"] == "bootstrap_over_batches"
    assert opposed["verdict"] == "stale"
    assert following["corrected_ci"][0] > 0
    smaller = judged({name: norm / 100 for name, norm in NORMS.items()}, NORMS)  # the noise is a share of the value
    assert smaller["ceiling"] == pytest.approx(check(publisher, local())["levels"][0]["ceiling"], abs=0.01)


# --- what does not match


def test_no_common_layer_is_no_verdict(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    answer = check(publisher, local({f"elsewhere-{name}": norm for name, norm in NORMS.items()}))
    assert (answer["verdict"], answer["advice"], answer["matched"]) == ("indeterminate", "measure", 0)
    assert answer["levels"][0]["reasons"] == ["too_few_layers"]
    assert len(answer["only_published"]) == len(answer["only_local"]) == 24
    assert not {"top_overlap", "rank_biased_overlap"} & set(answer)


@pytest.mark.parametrize("finer", ["local", "published"])
def test_finer_layers_are_put_together_on_either_side(publisher: httpx2.Client, finer: str) -> None:
    split = {f"{name}.{part}": share * norm for name, norm in NORMS.items() for part, share in (("q", 0.6), ("k", 0.8))}
    publisher.post("/v1/blueprints", json=published(split if finer == "published" else NORMS))
    answer = check(publisher, local(split if finer == "local" else NORMS, noise=0.05))
    assert (answer["verdict"], answer["matched"]) == ("fresh", 24)
    assert answer["rolled_up"] == sorted(NAMES)
    assert not {"only_published", "only_local"} & {name for name, value in answer.items() if value}


def test_few_of_many_layers_are_never_fresh(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    answer = check(publisher, local(dict(list(NORMS.items())[:9]), noise=0.01))
    assert (answer["verdict"], answer["levels"][0]["reasons"]) == ("indeterminate", ["few_matched"])
    assert len(answer["only_published"]) == 15


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"local": {"layers": []}},
        {"local": {"layers": [{"id": "a"}]}},
        {"local": {"layers": [{"id": "a", "value": -1}]}},
        {"local": {"layers": [{"id": "a", "batches": []}]}},
        {"local": {"layers": [{"id": "a", "value": 1}, {"id": "a", "value": 2}]}},
        {"local": {"layers": [{"id": "a", "batches": [1]}, {"id": "b", "batches": [1, 2]}]}},
        {"local": {"layers": [{"id": "a", "batches": [1]}, {"id": "b", "value": 1}]}},
        {"local": {"layers": [{"id": "a", "value": 1}]}, "digest": "sha256:" + "0" * 64},
        {"local": {"layers": [{"id": "a", "value": 1}]}, "threshold": 1.5},
        {"local": {"layers": [{"id": "a", "value": 1}]}, "top": 0},
        {"local": {"layers": [{"id": "a", "value": 1}]}, "domain": "=cmd()"},
        {"local": {"layers": [{"id": "a", "value": 1}]}, "offer_norms": True},
        {"local": {"layers": [{"id": "a\x00", "value": 1}]}},
    ],
)
def test_a_request_that_cannot_be_is_refused(publisher: httpx2.Client, body: dict[str, Any]) -> None:
    publisher.post("/v1/blueprints", json=published())
    assert publisher.post(PATH, json=body).status_code == 422


def test_numbers_beyond_float64_are_refused_and_huge_ones_judged(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published({name: 1e300 * norm for name, norm in NORMS.items()}))
    refused = publisher.post(PATH, content=b'{"local": {"layers": [{"id": "a", "value": 1e999}]}}')
    assert refused.status_code == 422
    huge = {name: 1e300 * norm for name, norm in NORMS.items()}
    split = {f"{name}.{part}": norm for name, norm in huge.items() for part in ("q", "k")}
    assert check(publisher, local(huge))["verdict"] == "fresh"
    assert check(publisher, local(split))["verdict"] == "fresh"


def test_what_there_is_not_is_said(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    body = {"local": local()}
    assert publisher.post(PATH.replace("tiny", "none"), json=body).json()["code"] == "model_not_found"
    assert publisher.post(PATH.replace("0.8", "0.9"), json=body).json()["code"] == "checkpoint_not_found"
    assert publisher.post(PATH, json=body | {"version": 7}).json()["code"] == "blueprint_not_found"
    unknown = publisher.post(PATH, json={"digest": "sha256:" + "0" * 64})
    assert unknown.json()["code"] == "blueprint_not_found"


# --- evidence


def keys(server: Server, count: int) -> list[dict[str, str]]:
    return [{"Authorization": f"Bearer {server.key(f'adapter-{number}')}"} for number in range(count)]


def keep(http: httpx2.Client, key: dict[str, str], norms: dict[str, float], **options: Any) -> dict[str, Any]:
    body = {"local": local(norms), "keep": True, "domain": "code"} | options
    return dict(http.post(PATH, json=body, headers=key).raise_for_status().json())


def evidence(http: httpx2.Client, **query: str) -> list[dict[str, Any]]:
    path = PATH.replace("staleness", "evidence")
    return list(http.get(path, params=query).raise_for_status().json()["evidence"])


def test_a_check_is_kept_only_with_consent_and_a_key(publisher: httpx2.Client, server: Server) -> None:
    publisher.post("/v1/blueprints", json=published())
    assert check(publisher, local())["kept"] is False
    assert evidence(publisher) == []
    with httpx2.Client(base_url=server.url) as nobody:
        assert nobody.post(PATH, json={"local": local()}).status_code == 200
        assert nobody.post(PATH, json={"local": local(), "keep": True}).json()["code"] == "unauthenticated"
    answer = check(publisher, local(), keep=True, domain="code")
    assert answer["kept"] is True
    (kept,) = evidence(publisher)
    assert kept == {
        "day": kept["day"],
        "training_checkpoint": 0.8,
        "digest": answer["digest"],
        "domain": "code",
        "verdict": "fresh",
        "level": "layer",
        "threshold": DEFAULT_THRESHOLD,
        "n": 24,
        "spearman": round(answer["levels"][0]["spearman"], 2),
        "corrected": round(answer["levels"][0]["corrected"], 2),
        "ceiling": round(answer["levels"][0]["ceiling"], 2),
        "top_overlap": answer["top_overlap"],
    }


def test_what_counts_as_evidence_is_judged_at_the_default_threshold(publisher: httpx2.Client, server: Server) -> None:
    publisher.post("/v1/blueprints", json=published())
    (key,) = keys(server, 1)
    answer = keep(publisher, key, NORMS, threshold=0.99999, local=local(noise=0.02))
    assert (answer["threshold"], answer["kept"]) == (0.99999, True)
    assert answer["verdict"] != "fresh"
    (kept,) = evidence(publisher)
    assert (kept["threshold"], kept["verdict"], kept["level"]) == (DEFAULT_THRESHOLD, "fresh", "layer")


def test_norms_are_kept_only_where_they_are_offered(publisher: httpx2.Client, server: Server) -> None:
    publisher.post("/v1/blueprints", json=published())
    first, second = keys(server, 2)
    keep(publisher, first, NORMS)
    keep(publisher, second, NORMS, offer_norms=True)
    offered, not_offered = evidence(publisher)
    assert "norms" not in not_offered
    assert offered["norms"] == pytest.approx(
        {layer["id"]: np.mean(layer["batches"]) for layer in local()["layers"]}, rel=1e-12
    )


def test_one_key_has_one_voice_per_blueprint_domain_and_day(
    publisher: httpx2.Client, server: Server, database_url: str
) -> None:
    publisher.post("/v1/blueprints", json=published())
    (key,) = keys(server, 1)
    assert keep(publisher, key, NORMS)["kept"]
    again = keep(publisher, key, other_norms())
    assert not again["kept"]
    assert "today" in again["not_kept"]
    assert keep(publisher, key, NORMS, domain="legal")["kept"]
    publisher.post("/v1/blueprints", json=published(other_norms()))
    assert keep(publisher, key, NORMS)["kept"]  # of the next version
    assert len(evidence(publisher)) == 3
    assert len(evidence(publisher, domain="legal")) == 1


def test_the_alarm_is_raised_once_and_cleared_once(publisher: httpx2.Client, server: Server, database_url: str) -> None:
    publisher.post("/v1/blueprints", json=published())
    users = keys(server, 8)
    for key in users[:2]:
        keep(publisher, key, other_norms())

    def summary() -> dict[str, Any]:
        return dict(publisher.get("/v1/models/tiny/evidence").raise_for_status().json())

    (domain,) = summary()["domains"]
    assert (domain["users"], domain["stale"], domain["alarm"]) == (2, 2, False)  # two are not enough to tell
    keep(publisher, users[2], other_norms())
    keep(publisher, users[3], other_norms())
    told = summary()
    assert [(event["kind"], event["users"]) for event in told["events"]] == [("raised", 3)]
    assert (told["domains"][0]["alarm"], told["domains"][0]["stale_share"]) == (True, 1.0)
    for key in users[4:]:
        keep(publisher, key, NORMS)
    assert [event["kind"] for event in summary()["events"]] == ["raised"]  # half of them: still at the limit
    keep(publisher, {"Authorization": f"Bearer {server.key('one-more')}"}, NORMS)
    told = summary()
    assert [event["kind"] for event in told["events"]] == ["cleared", "raised"]
    assert (told["domains"][0]["fresh"], told["domains"][0]["stale"], told["domains"][0]["alarm"]) == (5, 4, False)


def test_an_alarm_stands_until_somebody_finds_the_blueprint_fresh(
    publisher: httpx2.Client, server: Server, database_url: str
) -> None:
    publisher.post("/v1/blueprints", json=published())
    users = keys(server, 7)
    for key in users[:3]:
        keep(publisher, key, other_norms())
    # another day the third can no longer tell
    execute(
        database_url,
        "INSERT INTO evidence (checkpoint_id, document_id, key_id, domain, day, verdict, threshold, layers) "
        "SELECT checkpoint_id, document_id, key_id, domain, day - 1, 'indeterminate', threshold, 3 "
        "FROM evidence ORDER BY id DESC LIMIT 1",
    )

    def events_after(key: dict[str, str], norms: dict[str, float]) -> tuple[Any, ...]:
        keep(publisher, key, norms)
        told = publisher.get("/v1/models/tiny/evidence").raise_for_status().json()
        domain = told["domains"][0]
        return domain["fresh"], domain["stale"], domain["indeterminate"], [event["kind"] for event in told["events"]]

    few = {name: NORMS[name] for name in NAMES[:3]}
    assert events_after(users[3], few) == (0, 2, 2, ["raised"])
    assert events_after(users[4], NORMS) == (1, 2, 2, ["raised"])
    assert events_after(users[5], NORMS) == (2, 2, 2, ["raised"])
    assert events_after(users[6], NORMS) == (3, 2, 2, ["cleared", "raised"])


def test_evidence_is_paged_and_says_nobodys_name(publisher: httpx2.Client, server: Server) -> None:
    publisher.post("/v1/blueprints", json=published())
    for key in keys(server, 3):
        keep(publisher, key, NORMS)
    path = PATH.replace("staleness", "evidence") + "?limit=2"
    first = publisher.get(path)
    assert "adapter" not in first.text
    assert len(first.json()["evidence"]) == 2
    assert len(publisher.get(first.json()["next"]).json()["evidence"]) == 1
    assert publisher.get("/v1/models/none/evidence").json()["code"] == "model_not_found"
    missing = publisher.get(path.replace("0.8", "0.9")).json()
    assert (missing["code"], missing["checkpoints"]) == ("checkpoint_not_found", [0.8])


@pytest.mark.parametrize("table", ["evidence", "staleness_events"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET at = at", "TRUNCATE {} CASCADE"])
def test_evidence_cannot_be_changed(database_url: str, table: str, statement: str) -> None:
    with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
        execute(database_url, statement.format(table))


# --- profiling anew


def test_a_checkpoint_is_profiled_anew_as_it_was_before(
    publisher: httpx2.Client, database_url: str, server: Server
) -> None:
    path = PATH.replace("staleness", "refresh")
    publisher.post("/v1/blueprints", json=published())
    assert publisher.post(path).json()["code"] == "job_not_found"
    wanted = {
        "model_id": "tiny",
        "training_checkpoint": 0.8,
        "source": "/data/tiny",
        "data": {"code": {"source": "/data/code.txt"}},
    }
    earlier = publisher.post("/v1/jobs", json=wanted).json()
    assert publisher.post(path).status_code == 404  # it has not succeeded yet
    execute(database_url, "UPDATE jobs SET state = 'succeeded'")
    again = publisher.post(path)
    assert again.status_code == 202
    job = again.json()
    assert again.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["id"] != earlier["id"]
    assert {name: job[name] for name in ("model_id", "source", "data", "state")} == {
        "model_id": "tiny",
        "source": "/data/tiny",
        "data": earlier["data"],
        "state": "queued",
    }


def test_without_batches_the_interval_is_that_of_the_layers(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=published())
    sample = {"layers": [{"id": name, "value": norm} for name, norm in NORMS.items()]}
    answer = check(publisher, sample)
    level = answer["levels"][0]
    assert (level["interval_method"], answer["verdict"]) == ("fisher_z", "fresh")
    assert "ceiling" not in level
    half_width = 1.959964 * math.sqrt((1 + (1 - 12 / (24**3 - 24)) ** 2 / 2) / 21)
    assert level["spearman_ci"][0] == pytest.approx(math.tanh(math.atanh(1 - 12 / (24**3 - 24)) - half_width), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (PATH.replace("staleness", "evidence") + "?cursor=x", 422),
        (PATH.replace("staleness", "evidence") + "?limit=0", 422),
        (PATH.replace("staleness", "evidence") + "?domain=%01", 422),
        (PATH.replace("staleness", "evidence") + "?domain=a%00b", 400),
        (PATH.replace("staleness", "evidence").replace("0.8", "1.5"), 422),
        ("/v1/models/a/b/c/evidence", 404),
    ],
)
def test_a_question_about_evidence_that_cannot_be_is_refused(publisher: httpx2.Client, path: str, status: int) -> None:
    publisher.post("/v1/blueprints", json=blueprint_document())
    answer = publisher.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 10_000, b'{"a": NaN}', b"\xff", b"\0"])
def test_a_refresh_reads_no_body_and_starts_nothing_without_an_earlier_job(
    publisher: httpx2.Client, body: bytes
) -> None:
    publisher.post("/v1/blueprints", json=blueprint_document())
    answer = publisher.post(PATH.replace("staleness", "refresh"), content=body)
    assert answer.status_code == 404
    assert publisher.get("/v1/jobs").json()["jobs"] == []
