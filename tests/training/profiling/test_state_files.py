"""States as files: nothing is lost on the way, and parts merge in any grouping and order into the whole."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling import GradientProfiler, load_state, merge, save_state
from gradient_blueprints.training.profiling.state import DomainState, Factors, ProfileState
from gradient_blueprints.training.profiling.state_files import FORMAT, load_notes
from tests.training.profiling.small_models import batch, build, llama

WORK = [(domain, index) for domain in ("general", "bio") for index in range(6)]


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # enough numbers for a rounding that is too fine to show


def run(work: list[tuple[str, int]], **options: Any) -> GradientProfiler:
    torch.manual_seed(0)
    with GradientProfiler(llama(**WIDE), **({"general": "general"} | options)) as profiler:
        for domain, index in work:
            profiler.step(batch(seed=index + 100 * (domain == "bio")), domain=domain, key=index)
    return profiler


@pytest.fixture(scope="module")
def whole() -> GradientProfiler:
    return run(WORK)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file for each batch."""
    folder = tmp_path_factory.mktemp("parts")
    return [save_state(run([one]).state(), folder / f"{number}") for number, one in enumerate(WORK)]


@pytest.fixture(scope="module")
def loaded(parts: list[Path]) -> list[ProfileState]:
    return [load_state(part) for part in parts]


def assert_same(one: ProfileState, two: ProfileState, *, sums: float = 0) -> None:
    """Equal to the bit, except that sums over batches may differ by the relative tolerance `sums`."""

    def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype
            scale = float(tensor.abs().max()) if tensor.numel() else 0.0
            torch.testing.assert_close(tensor, right[name], rtol=sums, atol=sums * scale)

    def factors(domain: DomainState) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = {name: held.row for name, held in domain.factors.items()}
        return rows, {name: held.column for name, held in domain.factors.items() if held.column is not None}

    assert (one.layers, one.domains.keys()) == (two.layers, two.domains.keys())
    for name, domain in one.domains.items():
        other = two.domains[name]
        assert (domain.skipped, domain.halved, domain.silent) == (other.skipped, other.halved, other.silent)
        assert domain.squared == other.squared
        assert domain.records.keys() == other.records.keys()
        for key, record in domain.records.items():
            found = other.records[key]
            assert (record.length, record.digest) == (found.length, found.digest)
            for attribute in ("losses", "tokens", "example_squares", "norms"):
                np.testing.assert_array_equal(getattr(record, attribute), getattr(found, attribute))
            assert (record.counts is None) == (found.counts is None)
            for (first, counts), (also, same) in zip(record.counts or (), found.counts or (), strict=True):
                assert first == also
                np.testing.assert_array_equal(counts, same)
        same_tensors(domain.sums, other.sums)
        same_tensors(domain.squares, other.squares)
        for left, right in zip(factors(domain), factors(other), strict=True):
            same_tensors(left, right)
        for histogram, found_histogram in zip(domain.histograms, other.histograms, strict=True):
            np.testing.assert_array_equal(histogram.counts, found_histogram.counts)
            np.testing.assert_array_equal(histogram.top, found_histogram.top)
            np.testing.assert_allclose(histogram.sums, found_histogram.sums, rtol=1e-12 if sums else 0)


@pytest.mark.parametrize("statistics", ["all", "batches", "examples"])
def test_a_state_read_back_is_the_one_that_was_written(statistics: str, tmp_path: Path) -> None:
    state = run(WORK[4:9], statistics=statistics).state()
    state.domains["general"].skipped |= {7: "non-finite loss", "named": "no target token"}
    state.domains["bio"].halved[1] = 2
    state.domains["bio"].silent |= {1: (0, 2), "named": (0,)}
    state.domains["empty"] = DomainState(skipped={0: "non-finite loss"})
    path = save_state(state, tmp_path / "state.safetensors", {"seed": [1, None]})
    assert_same(load_state(path), state)
    assert load_notes(path) == {"seed": [1, None]}


def without(field: str, path: Path) -> Path:
    """The file as it was before its domains had the field."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a method alone
    for domain in header["domains"]:
        del domain[field]
    save_file(tensors, path, metadata={FORMAT: json.dumps(header)})
    return path


def test_a_file_from_before_silent_examples_were_noted_is_read(tmp_path: Path) -> None:
    state = run(WORK[:2], statistics="examples").state()
    assert_same(load_state(without("silent", save_state(state, tmp_path / "state"))), state)


def test_a_file_from_before_squared_batches_were_counted_counts_them_where_squares_are_of_all(tmp_path: Path) -> None:
    other = run([("bio", 20)], general="bio").state()
    state = merge([run(WORK).state(), other])
    assert not state.domains["bio"].squares
    state.domains["bio"].squares = other.domains["bio"].squares  # as they were kept then
    found = load_state(without("squared", save_state(state, tmp_path / "state")))
    assert {name: domain.squared for name, domain in found.domains.items()} == {"general": 6, "bio": 0}
    assert found.domains["general"].squares
    assert not found.domains["bio"].squares


def test_shards_keep_the_places_of_examples_without_a_target(tmp_path: Path) -> None:
    stream = [batch(seed=seed) for seed in range(3)]
    stream[0]["labels"][:] = -100
    stream[2]["labels"][1] = -100

    def table(*shards: range) -> NDArray[np.float64]:
        gathered = GradientProfiler(build("llama"), statistics="examples")
        for shard in shards:
            with GradientProfiler(build("llama"), statistics="examples") as profiler:
                for number in shard:
                    profiler.step(stream[number], key=number)
            gathered.absorb(load_state(save_state(profiler.state(), tmp_path / "shard")))
        return gathered.table()

    found = table(range(2, 3), range(2))
    assert np.flatnonzero(found.sum(0) == 0).tolist() == [0, 1, 2, 3, 9]
    np.testing.assert_allclose(found, table(range(3)), rtol=1e-5)


def test_a_state_without_a_batch_can_be_written(tmp_path: Path) -> None:
    state = GradientProfiler(build("llama")).state()
    assert_same(load_state(save_state(state, tmp_path / "state")), state)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(len(WORK))), cuts=st.sets(st.integers(1, len(WORK) - 1)))
def test_parts_in_any_order_and_grouping_merge_into_the_whole(
    whole: GradientProfiler, loaded: list[ProfileState], order: list[int], cuts: set[int]
) -> None:
    shuffled = [loaded[number] for number in order]
    bounds = [0, *sorted(cuts), len(shuffled)]
    groups = [merge(shuffled[start:stop]) for start, stop in pairwise(bounds)]
    assert_same(merge(groups), whole.state(), sums=1e-6)


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_give_the_document_and_the_factors_of_one_run(
    whole: GradientProfiler, loaded: list[ProfileState], shards: int
) -> None:
    gathered = GradientProfiler(llama(**WIDE), general="general")
    gathered.absorb(*(merge(loaded[start::shards]) for start in reversed(range(shards))))
    expected, found = (profiler.blueprint("tiny", 1.0).to_dict() for profiler in (whole, gathered))
    assert found["layers"] == expected["layers"]
    assert found["extra"] == expected["extra"]
    for name, tensor in gathered.factors().items():
        torch.testing.assert_close(tensor, whole.factors()[name], rtol=1e-6, atol=0)


def test_what_is_no_state_or_a_part_of_one_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    (tmp_path / "text").write_text("nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "cut").write_bytes(parts[0].read_bytes()[:-8])
    for name in ("absent", "text", "other", "cut"):
        with pytest.raises(ConfigurationError, match="no profile state"):
            load_state(tmp_path / name)
    for header in (
        "[]",
        "{}",
        '{"layers": 1, "domains": [], "notes": {}}',
        '{"layers": [], "domains": []}',
        "[" * 10_000,
    ):
        save_file({}, tmp_path / "forged", metadata={FORMAT: header})
        for load in (load_state, load_notes):
            with pytest.raises(ConfigurationError, match="no profile state"):
                load(tmp_path / "forged")


def test_factors_of_vectors_have_no_columns(tmp_path: Path) -> None:
    factors = {"a": Factors(torch.rand(3, dtype=torch.float64), None), "b": Factors(torch.rand(2, 3), torch.rand(2, 4))}
    state = ProfileState(("x",), {"d": DomainState(factors=factors)})
    assert_same(load_state(save_state(state, tmp_path / "state")), state)
