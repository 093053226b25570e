"""Adding up what processes spent, and the block for a model card."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gradient_blueprints import tallies
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Basis, Instrument, Method, Resource, Span, Tally
from gradient_blueprints.tallies import covered, merge_tallies, settle

CLOCK = Method(basis=Basis.MEASURED, instruments=(Instrument.CLOCK,))
COUNTER = Method(basis=Basis.MEASURED, instruments=(Instrument.NVML_COUNTER,))
METHODS = {Resource.SECONDS: CLOCK, Resource.ENERGY_KWH: COUNTER, Resource.TOKENS: CLOCK}


def span(sensor: str, resource: Resource, started: float, ended: float, amount: float) -> Span:
    return Span(sensor=sensor, resource=resource, started=started, ended=ended, amount=amount)


def rank(number: int, started: float = 0, ended: float = 10, **options: Any) -> Tally:
    """A process that shares device 0 with others, and has a share of the tokens."""
    return settle(
        [
            span("wall", Resource.SECONDS, started, ended, ended - started),
            span("device-0", Resource.ENERGY_KWH, started, ended, 2 * (ended - started)),
            span(f"process-{number}", Resource.TOKENS, started, ended, 100),
        ],
        METHODS,
        **options,
    )


def test_the_example_of_a_device_that_two_processes_share_holds() -> None:
    assert doctest.testmod(tallies).failed == 0


def test_ranks_side_by_side_add_their_tokens_and_share_the_hour_and_the_joules() -> None:
    both = merge_tallies([rank(0), rank(1)])
    assert (both.seconds, both.energy_kwh, both.tokens) == (10, 20, 200)


def test_runs_one_after_the_other_add_up() -> None:
    both = merge_tallies([rank(0, 0, 10), rank(1, 20, 25)])
    assert (both.seconds, both.energy_kwh, both.tokens) == (15, 30, 200)


def test_a_later_reading_of_the_same_count_replaces_the_earlier() -> None:
    assert merge_tallies([rank(0, 0, 10), rank(0, 0, 4), rank(0, 0, 10)]) == rank(0, 0, 10)


spans = st.lists(
    st.builds(
        lambda sensor, start, length, rate: span(sensor, Resource.ENERGY_KWH, start, start + length, rate * length),
        st.sampled_from(["a", "b"]),
        st.integers(0, 20),
        st.integers(1, 20),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=8,
)


@given(spans)
def test_the_common_time_of_spans_counts_once_at_the_largest_rate(drawn: list[Span]) -> None:
    of_one = [span for span in drawn if span.sensor == drawn[0].sensor]
    by_second = sum(
        max((s.amount / (s.ended - s.started) for s in of_one if s.started <= second < s.ended), default=0.0)
        for second in range(40)
    )
    assert covered(of_one) == pytest.approx(by_second)


@given(spans, spans, spans)
def test_tallies_merge_in_any_order_and_any_number_of_times(a: list[Span], b: list[Span], c: list[Span]) -> None:
    first, second, third = (settle(drawn, METHODS) for drawn in (a, b, c))
    whole = merge_tallies([first, second, third])
    assert merge_tallies([merge_tallies([third, first]), second, first]) == whole
    assert merge_tallies([whole, whole]) == whole


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0, 1e4), st.integers(0, 10**9)), min_size=1, max_size=6))
def test_counts_that_no_other_span_overlaps_are_exact(pieces: list[tuple[float, float, int]]) -> None:
    now, drawn = 1.7e9, []
    for length, pause, tokens in pieces:
        drawn.append(span("process", Resource.TOKENS, now, now + length, tokens))
        now += length + pause
    assert covered(drawn) == sum(tokens for _, _, tokens in pieces)


def test_a_rank_that_could_not_read_its_energy_makes_the_sum_a_lower_bound() -> None:
    blind = settle([span("wall", Resource.SECONDS, 0, 10, 10)], {Resource.SECONDS: CLOCK})
    both = merge_tallies([rank(0), blind])
    assert both.energy_kwh == 20
    assert both.methods[Resource.ENERGY_KWH].basis is Basis.PARTIAL
    assert not both.methods[Resource.ENERGY_KWH].comparable(COUNTER) or both.methods[Resource.SECONDS] == CLOCK


def test_two_regions_are_both_named_and_have_no_common_intensity() -> None:
    both = merge_tallies(
        [rank(0, region="Iceland", carbon_intensity=28), rank(1, region="Poland", carbon_intensity=660)]
    )
    assert both.region == "Iceland; Poland"
    assert both.carbon_intensity is None


def test_what_was_told_and_not_metered_is_not_merged() -> None:
    told = Tally(tokens=5, methods={Resource.TOKENS: Method(basis=Basis.ESTIMATED, instruments=(Instrument.GIVEN,))})
    with pytest.raises(ConfigurationError, match="without spans"):
        merge_tallies([told, rank(0)])


@pytest.mark.parametrize("fields", [{"energy_kwh": 0.0}, {"methods": {"energy_kwh": COUNTER}}])
def test_a_figure_without_a_method_and_a_method_without_a_figure_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="energy_kwh"):
        Tally(**fields)


def test_a_tally_survives_its_json() -> None:
    assert Tally.model_validate_json(rank(0).model_dump_json()) == rank(0)


def carbon(kilograms: float, **options: Any) -> Tally:
    spans = [span("device-0", Resource.CARBON_KG, 0, 1, kilograms)]
    method = Method(basis=Basis.PARTIAL, instruments=(Instrument.CARBON_INTENSITY,), missing=("memory",))
    return settle(spans, {Resource.CARBON_KG: method}, **options)


@pytest.mark.parametrize("kilograms", [0.0, 1e-9, 0.0125, 552_000.0])
def test_the_card_gives_grams_that_the_hubs_own_reader_reads(kilograms: float) -> None:
    tally = carbon(kilograms, region='Rhône: "east"', hardware={"a": "NVIDIA A100", "b": "NVIDIA A100"})
    card: Any = ModelCard(tally.model_card("pre-training"))
    metadata = card.data.to_dict()["co2_eq_emissions"]
    assert metadata["emissions"] == pytest.approx(kilograms * 1e3, rel=1e-3)
    assert metadata["training_type"] == "pre-training"
    assert metadata["geographical_location"] == 'Rhône: "east"'
    assert metadata["hardware_used"] == "2 × NVIDIA A100"
    assert "a lower bound, without memory" in metadata["source"]
    assert "training_type" not in tally.model_card()


def test_a_card_without_a_carbon_figure_claims_none() -> None:
    card = rank(0).model_card()
    assert "co2_eq_emissions" not in card
    assert "| carbon kg | not read |" in card
    assert "| energy kwh | 20 kWh | measured: nvml_counter |" in card
