"""The meter on real training steps, and its sensors."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BartForSequenceClassification

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Basis, Instrument, Resource
from gradient_blueprints.training.flops import FlopRate, flops_by_counting, flops_by_formula
from gradient_blueprints.training.profiling.losses import IGNORED
from gradient_blueprints.training.resources import JOULES_PER_KWH, ResourceMeter
from gradient_blueprints.training.sensors import NvidiaDevice, rapl_domains
from tests.training.profiling.small_models import VOCABULARY, bart, batch, llama, mixtral, t5


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        model(**batch(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


@pytest.fixture
def no_counters(tmp_path: Path) -> Path:
    return tmp_path / "empty"


# --- tokens and FLOPs


def test_it_counts_the_tokens_of_training_without_padding_and_not_those_of_evaluation() -> None:
    model = llama()
    with ResourceMeter(model) as meter:
        train(model, torch.optim.SGD(model.parameters()))
        with torch.no_grad():
            model(**batch(4))
        model.eval()
        model(**batch(4))
    assert meter.tally().tokens == 3 * int(batch(4)["attention_mask"].sum())
    assert meter.tally().flops == pytest.approx(3 * flops_by_formula(model).per_token * batch(4)["input_ids"].numel())
    assert meter.tally().methods[Resource.FLOPS].instruments == (Instrument.FLOP_FORMULA,)


def test_without_a_model_tokens_are_those_that_it_is_told_and_else_not_read() -> None:
    meter = ResourceMeter().start()
    assert meter.tally().tokens is None
    assert meter.tally().methods[Resource.TOKENS].basis is Basis.NOT_READ
    meter.count(tokens=100, flops=7e9)
    assert (meter.tally().tokens, meter.tally().flops) == (100, 7e9)
    meter.stop()


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_agrees_with_counting_the_matrix_products_of_a_step(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=192)
    example = batch(4, padded=False)
    products = flops_by_counting(lambda: model(**example).loss.backward(), example["input_ids"].numel())
    assert flops_by_formula(model).per_token == pytest.approx(products.per_token, rel=0.05)


def test_a_frozen_half_costs_a_third_less_of_its_flops() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    assert flops_by_formula(model).per_token == 6 * 200
    model[0].requires_grad_(False)
    assert flops_by_formula(model).per_token == pytest.approx(6 * 200 * (2 / 3 + 1 / 2 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_mixture_the_experts_that_a_token_meets_are_counted_however_they_are_run(dtype: torch.dtype) -> None:
    model: Any = mixtral(hidden_size=64, intermediate_size=128).to(dtype)
    example = batch(4, padded=False)
    counted = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        rate = flops_by_counting(lambda: model(**example).loss.backward(), example["input_ids"].numel())
        counted[implementation] = rate.per_token
    assert len(set(counted.values())) == 1, counted
    assert flops_by_formula(model).per_token == pytest.approx(counted["eager"], rel=0.05)


def test_products_that_transformers_groups_itself_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch cannot group them: older versions, and float32 under torch.compile."""
    model: Any = mixtral()
    example = batch(4, padded=False)
    monkeypatch.setattr(transformers.integrations.moe, "_can_use_grouped_mm", lambda *_: False)
    grouped = flops_by_counting(lambda: model(**example).loss.backward(), 1)
    model.set_experts_implementation("eager")
    assert flops_by_counting(lambda: model(**example).loss.backward(), 1) == grouped


def test_experts_are_found_in_a_list_too_and_a_mixture_that_tells_nothing_is_refused() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(8))})
    with pytest.raises(ConfigurationError, match=r"experts\.0 a token is routed to: count a step"):
        flops_by_formula(model)

    class Differing:
        """A configuration whose layers differ, as transformers has them."""

        @property
        def num_experts(self) -> int:
            raise RuntimeError("it may vary across layers")

    model.config = Differing()  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="count a step"):
        flops_by_formula(model)
    model.config = SimpleNamespace(num_experts=8, num_experts_per_tok=2)  # type: ignore[assignment]  # as transformers
    assert flops_by_formula(model).per_token == 6 * 200


@pytest.mark.parametrize("lengths", [(24, 4), (4, 24)])
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_and_decoder_count_each_for_what_it_reads(
    make: Callable[..., nn.Module], lengths: tuple[int, int]
) -> None:
    model = make(d_model=128)
    source, labels = (torch.randint(3, VOCABULARY, (2, length)) for length in lengths)
    with ResourceMeter(model) as meter:
        step = flops_by_counting(lambda: model(input_ids=source, labels=labels).loss.backward(), 1)
    assert meter.tally().tokens == 2 * sum(lengths)
    assert meter.tally().flops == pytest.approx(step.per_token, rel=0.05)
    labels[0, 2:] = IGNORED
    classes = torch.zeros(2, dtype=torch.long)
    with ResourceMeter(model) as meter:
        model(input_ids=source, labels=labels)
        model(input_ids=source, decoder_input_ids=source[:, :3])
        meter._see_batch(model, (source,), {"labels": classes})  # a classifier's
    assert meter.tally().tokens == (2 * sum(lengths) - (lengths[1] - 2)) + 2 * (lengths[0] + 3) + 4 * lengths[0]


def test_what_a_decoder_is_given_counts_however_it_is_given() -> None:
    source, mask = torch.randint(3, VOCABULARY, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[0, 4:] = 0
    model = t5()
    for args, given, tokens in (
        ((), {"input_ids": source, "decoder_inputs_embeds": torch.randn(2, 5, 16)}, 48 + 10),
        ((source, None, source[:, :5]), {}, 48 + 10),
        ((source, mask), {"labels": source[:, :5].clone()}, 28 + 10),
    ):
        with ResourceMeter(model) as meter:
            model(*args, **given)
        assert meter.tally().tokens == tokens
    config: Any = bart().config
    config.update({"num_labels": 3, "problem_type": "multi_label_classification"})
    classifier = BartForSequenceClassification(config).train()
    source[:, -1] = config.eos_token_id
    with ResourceMeter(classifier) as meter:
        classifier(input_ids=source, labels=torch.rand(2, 3))
    assert meter.tally().tokens == 2 * 48  # the decoder reads the source again


def test_an_encoder_that_nothing_tells_from_its_decoder_is_refused_until_a_rate_is_given() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = t5()
            self.config = self.inner.config

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.inner(**batch).loss
            return loss

    ids = torch.randint(3, VOCABULARY, (2, 6))
    with pytest.raises(ConfigurationError, match=r"get_encoder.*flop_rate"):
        flops_by_formula(Own())
    with ResourceMeter(model := Own(), flop_rate=FlopRate(2.0, Instrument.GIVEN)) as meter:
        model(input_ids=ids, labels=ids)
    assert (meter.tally().tokens, meter.tally().flops) == (24, 48)


# --- energy


def test_what_cannot_be_read_is_not_read_and_never_zero(no_counters: Path) -> None:
    with ResourceMeter(carbon_intensity=50, powercap=no_counters) as meter:
        work(0.01)
    tally = meter.tally()
    for resource in (Resource.ENERGY_KWH, Resource.CARBON_KG, Resource.ACCELERATOR_HOURS, Resource.FLOPS):
        assert getattr(tally, resource) is None
        assert tally.methods[resource].basis is Basis.NOT_READ
    assert Resource.ENERGY_KWH not in tally.amounts()


def test_watts_that_are_given_make_an_estimate_that_says_so(no_counters: Path) -> None:
    with ResourceMeter(
        processor_watts=100, memory_watts=10, carbon_intensity=500, region="Poland", powercap=no_counters
    ) as meter:
        work(0.2)
    tally = meter.tally()
    assert tally.processor_hours is not None
    assert tally.seconds is not None
    joules = 100 / (os.cpu_count() or 1) * tally.processor_hours * 3600 + 10 * tally.seconds
    assert tally.energy_kwh == pytest.approx(joules / JOULES_PER_KWH)
    assert tally.carbon_kg == pytest.approx(joules / JOULES_PER_KWH * 0.5)
    method = tally.methods[Resource.ENERGY_KWH]
    assert method.basis is Basis.ESTIMATED
    assert method.instruments == (Instrument.MEMORY_WATTS, Instrument.PROCESSOR_WATTS)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_a_process_that_may_use_one_core_is_charged_its_share_of_the_machines_watts(no_counters: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with ResourceMeter(processor_watts=100, powercap=no_counters) as meter:
            work(0.05)
    finally:
        os.sched_setaffinity(0, allowed)
    tally = meter.tally()
    assert tally.processor_hours is not None
    joules = 100 / (os.cpu_count() or 1) * tally.processor_hours * 3600
    assert tally.energy_kwh == pytest.approx(joules / JOULES_PER_KWH)


def test_an_estimate_of_the_processor_alone_is_a_lower_bound(no_counters: Path) -> None:
    with ResourceMeter(processor_watts=100, powercap=no_counters) as meter:
        work(0.01)
    assert meter.tally().methods[Resource.ENERGY_KWH].basis is Basis.PARTIAL
    assert meter.tally().methods[Resource.ENERGY_KWH].missing == ("memory",)


def test_zero_watts_are_refused_for_they_would_be_a_figure() -> None:
    with pytest.raises(ConfigurationError, match="leave it out"):
        ResourceMeter(processor_watts=0)


class Powercap:
    """The files of Linux' powercap interface, as the kernel lays them out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}.items():
            (root / folder).mkdir(parents=True)
            (root / folder / "name").write_text(f"{name}\n")
            (root / folder / "max_energy_range_uj").write_text("1000000\n")
            self.set(folder, 999_000)

    def set(self, folder: str, microjoules: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


def test_package_and_memory_are_read_by_rapl_even_when_the_register_wraps_around(tmp_path: Path) -> None:
    powercap = Powercap(tmp_path)
    with ResourceMeter(powercap=tmp_path, processor_watts=100) as meter:
        powercap.set("intel-rapl:0", 4_000)  # wrapped: 1,001 to the end of the range, and 4,000
        powercap.set("intel-rapl:0:0", 999_999)  # cores are part of the package
        powercap.set("intel-rapl:0:1", 999_500)
    tally = meter.tally()
    assert tally.energy_kwh == pytest.approx((5_001 + 500) / 1e6 / JOULES_PER_KWH)
    assert tally.methods[Resource.ENERGY_KWH].basis is Basis.MEASURED
    assert tally.methods[Resource.ENERGY_KWH].instruments == (Instrument.RAPL,)


def test_joules_of_a_pause_do_not_count(tmp_path: Path) -> None:
    powercap = Powercap(tmp_path)
    meter = ResourceMeter(powercap=tmp_path).start()
    powercap.set("intel-rapl:0", 999_100)
    meter.pause()
    powercap.set("intel-rapl:0", 999_700)
    meter.start()
    powercap.set("intel-rapl:0", 999_800)
    meter.stop()
    assert meter.tally().energy_kwh == pytest.approx(200 / 1e6 / JOULES_PER_KWH)


def test_a_counter_that_may_not_be_read_is_missing(tmp_path: Path) -> None:
    Powercap(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert [domain.part for domain in rapl_domains(tmp_path)] == ["memory"]
    with ResourceMeter(powercap=tmp_path) as meter:
        pass
    assert meter.tally().methods[Resource.ENERGY_KWH].missing == ("processor",)


def test_a_counter_that_fails_under_way_keeps_what_it_counted_and_is_missing_from_then_on(tmp_path: Path) -> None:
    powercap = Powercap(tmp_path)
    with ResourceMeter(powercap=tmp_path) as meter:
        powercap.set("intel-rapl:0", 999_100)
        meter.tally()
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.tally().energy_kwh == pytest.approx(100 / 1e6 / JOULES_PER_KWH)
    assert meter.tally().methods[Resource.ENERGY_KWH].basis is Basis.PARTIAL


class NvmlError(Exception):
    pass


def nvml(energy: list[int] | None, power: list[int]) -> Any:
    """What pynvml answers, from lists; there is no NVIDIA device on the machines that run these tests."""

    def read(values: list[int] | None) -> int:
        if not values:
            raise NvmlError("not supported")
        return values.pop(0)

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: read(energy),
        nvmlDeviceGetPowerUsage=lambda handle: read(power),
    )


def test_an_nvidia_device_is_read_by_its_energy_counter_in_millijoules() -> None:
    device = NvidiaDevice(nvml([1_000, 1_500, 400], []), None, "cuda-0")
    assert device.instrument is Instrument.NVML_COUNTER
    assert device.joules(1.0) == 0.5
    assert device.joules(1.0) == 0.0  # the driver was loaded anew
    with pytest.raises(OSError, match="cannot be read any more"):
        device.joules(1.0)


def test_an_older_nvidia_device_is_read_by_its_power_in_milliwatts() -> None:
    device = NvidiaDevice(nvml(None, [100_000, 200_000]), None, "cuda-0")
    assert device.instrument is Instrument.NVML_POWER
    assert device.joules(2.0) == 300.0


# --- time, memory, parts


def test_pauses_are_left_out_and_parts_told_apart() -> None:
    with ResourceMeter() as meter:
        with meter.part("epoch"), meter.part("evaluation"):
            time.sleep(0.05)
        meter.pause()
        time.sleep(0.6)
        meter.start()
    tally, parts = meter.tally(), meter.parts()
    assert tally.seconds is not None
    assert 0.05 <= tally.seconds < 0.6
    assert parts["epoch/evaluation"][Resource.SECONDS] >= 0.05
    assert parts["epoch"][Resource.SECONDS] >= parts["epoch/evaluation"][Resource.SECONDS]


def test_meters_inside_each_other_do_not_disturb_each_other() -> None:
    model = llama()
    with ResourceMeter(model) as outer:
        train(model, torch.optim.SGD(model.parameters()), steps=1)
        with ResourceMeter(model) as inner:
            train(model, torch.optim.SGD(model.parameters()), steps=2)
    assert outer.tally().tokens == pytest.approx(1.5 * (inner.tally().tokens or 0))
    assert not [thread for thread in threading.enumerate() if thread.name == "resource-meter"]
    assert not model._forward_pre_hooks


def test_memory_over_time_holds_the_optimizers_state_apart() -> None:
    model = llama(hidden_size=64, intermediate_size=192)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    with ResourceMeter(model, optimizer, interval=0.02) as meter:
        time.sleep(0.1)
    tally = meter.tally()
    assert tally.seconds is not None
    state = sum(value.nbytes for moments in optimizer.state.values() for value in moments.values())
    assert tally.optimizer_gb_hours == pytest.approx(state / 1e9 * tally.seconds / 3600)
    assert tally.vram_gb_hours is not None
    assert tally.vram_gb_hours > (tally.optimizer_gb_hours or 0)
    assert tally.methods[Resource.VRAM_GB_HOURS].instruments == (Instrument.RESIDENT_SET,)


# --- resuming


def test_a_meter_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    model = llama()
    with ResourceMeter(model, processor_watts=50) as first:
        train(model, torch.optim.SGD(model.parameters()))
        with first.part("evaluation"):
            pass
    first.save(tmp_path / "state.json")
    second = ResourceMeter(model, processor_watts=50)
    second.load(tmp_path / "state.json")
    assert second.tally() == first.tally()
    with second:
        train(model, torch.optim.SGD(model.parameters()))
    both, half = second.tally(), first.tally()
    assert both.tokens == 2 * (half.tokens or 0)
    assert (both.seconds or 0) > (half.seconds or 0)
    assert set(second.parts()) == {"evaluation"}
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_loading_older_states_of_the_same_process_counts_nothing_twice() -> None:
    model = llama()
    with ResourceMeter(model) as meter:
        train(model, torch.optim.SGD(model.parameters()))
        early = json.loads(json.dumps(meter.state_dict()))
        train(model, torch.optim.SGD(model.parameters()))
        late = json.loads(json.dumps(meter.state_dict()))
    before = meter.tally()
    for state in (late, early, late):
        meter.load_state_dict(state)
    assert meter.tally() == before


def test_a_meter_goes_on_from_the_states_of_several_processes_and_an_older_one_takes_nothing_away() -> None:
    states = []
    for name in ("evaluation", "saving"):
        with ResourceMeter() as meter:
            for _ in range(2):
                with meter.part(name):
                    work(0.01)
                states.append(json.loads(json.dumps(meter.state_dict())))
    together = ResourceMeter()
    for state in (*states, states[0]):
        together.load_state_dict(state)
    assert together.parts() == {
        name: spent for state in (states[1], states[3]) for of in state["parts"].values() for name, spent in of.items()
    }
