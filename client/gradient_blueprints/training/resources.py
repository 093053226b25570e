"""Γ, measured: a running tally of what training spends.

    with ResourceMeter(model, optimizer, carbon_intensity=56) as meter:
        train(model, optimizer)
    print(meter.tally().energy_kwh, meter.tally().methods["energy_kwh"])

What cannot be read is absent from the tally and its method says not_read; nothing is assumed. See docs/resources.md.
"""

from __future__ import annotations

import inspect
import json
import random
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Basis, Instrument, Method, Resource, Span, Tally
from gradient_blueprints.tallies import merge_tallies, settle
from gradient_blueprints.training.finetuning import optimizer_bytes
from gradient_blueprints.training.flops import FlopRate, encodes_and_decodes, flops_by_formula
from gradient_blueprints.training.profiling.distributed import unwrapped
from gradient_blueprints.training.profiling.losses import IGNORED
from gradient_blueprints.training.sensors import (
    POWERCAP,
    EnergyCounter,
    accelerators_of,
    allocated_bytes,
    cores_of_machine,
    device_id,
    device_name,
    host_id,
    nvidia_devices,
    processor_name,
    processor_seconds,
    rapl_domains,
    resident_bytes,
)

JOULES_PER_KWH = 3.6e6
HOUR = 3600.0
GB = 1e9
STATE_FORMAT = 1
Amounts = dict[Resource, float]


class ResourceMeter:
    """Counts time, energy, carbon, memory over time, FLOPs and tokens from `start` to `stop`, pauses left out.

    `model`: its accelerators are watched, and a hook counts the tokens of every training forward pass (attention
    masks respected; of an encoder-decoder model those that the decoder is given too) and their FLOPs,
    by `flop_rate`, which may be a mapping of its fields, or else 6·N·(2/3 + k/3). Without it, call `count`.
    `optimizer`: the memory of its state is told apart.
    `carbon_intensity`: g CO2e per kWh where the power is drawn, data-centre overhead folded in; `region` is its name.
    `processor_watts`, `memory_watts`: what all the machine's processors draw under full load, whether or not this
    process may use them all, and the memory always, for machines whose counters (RAPL) cannot be read. The figures are
    then marked as estimated; without them, as not read.
    `devices`: accelerators to watch beside the model's own.
    `interval`: mean seconds between two samples.

    Energy read from counters is that of the whole device or package, whoever used it. Meters may run inside each
    other; a meter is used from one thread.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        region: str | None = None,
        carbon_intensity: float | None = None,
        processor_watts: float | None = None,
        memory_watts: float | None = None,
        devices: Sequence[torch.device | str] = (),
        flop_rate: FlopRate | Mapping[str, Any] | None = None,
        interval: float = 1.0,
        powercap: Path | str = POWERCAP,
    ) -> None:
        for name, value in {"processor_watts": processor_watts, "memory_watts": memory_watts}.items():
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} = {value}: leave it out where it is not known, zero is a figure")
        self.model, self.optimizer = model, optimizer
        self.region, self.carbon_intensity = region, carbon_intensity
        self.processor_watts, self.memory_watts = processor_watts, memory_watts
        if isinstance(flop_rate, Mapping):
            flop_rate = FlopRate(**{**flop_rate, "instrument": Instrument(flop_rate["instrument"])})
        self.flop_rate = flop_rate
        self._by_formula: FlopRate | None = None
        self.interval = interval
        self._given = [torch.device(device) for device in devices]
        self._devices: list[torch.device] = []
        self._powercap = Path(powercap)
        self._host, self._id = host_id(), uuid.uuid4().hex[:12]
        self._counters: list[EnergyCounter] = []
        self._missing: set[str] = set()
        self._sums: dict[tuple[str, Resource], float] = defaultdict(float)
        self._tokens_by: set[Instrument] = set()
        self._flops_by: set[Instrument] = set()
        self._waiting: torch.Tensor | None = None  # tokens counted on the device, fetched when a tally is asked for
        self._parts: dict[str, dict[str, Amounts]] = {self._id: {}}
        self._open_parts: list[str] = []
        self._earlier: Tally | None = None
        self._started: float | None = None
        self._paused = 0.0
        self._hook: Any = None
        self._thread: threading.Thread | None = None
        self._hardware: dict[str, str] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._last_time = self._last_processor = self._last_memory = self._last_state = 0.0

    # --- running and pausing

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> Self:
        """Begin, or go on after `pause`."""
        if self.running:
            return self
        if self._started is None:
            self._started = time.time()
            self._find_sensors()
        else:
            for counter in list(self._counters):
                self._read(counter, 0)  # what was drawn during the pause does not count
        if self.model is not None:
            if self.flop_rate is None:
                self._by_formula = flops_by_formula(self.model)
            self._hook = self.model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        self._last_time, self._last_processor = time.perf_counter(), processor_seconds()
        self._last_memory, self._last_state = self._memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._ended,), name="resource-meter", daemon=True)
        self._thread.start()
        return self

    def pause(self) -> None:
        """Stop counting until `start`; what was counted stays."""
        if self._thread is None:
            return
        self._sample()
        self._paused = time.time()
        self._ended.set()
        self._thread.join()
        self._thread = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    stop = pause

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Tell apart what is spent within; parts lie inside each other as `epoch/evaluation`.

        >>> # with meter.part("evaluation"): evaluate(model)
        >>> # meter.parts()["evaluation"]["seconds"]
        """
        self._open_parts.append(name)
        path = "/".join(self._open_parts)
        before = self._own_tally().amounts()
        try:
            yield
        finally:
            spent = self._parts[self._id].setdefault(path, {})
            for resource, amount in self._own_tally().amounts().items():
                spent[resource] = spent.get(resource, 0.0) + amount - before.get(resource, 0.0)
            self._open_parts.pop()

    def parts(self) -> dict[str, Amounts]:
        """What was spent in each part, by resource; of the processes whose state was loaded too."""
        total: dict[str, Amounts] = {}
        for of_process in self._parts.values():
            for name, spent in of_process.items():
                found = total.setdefault(name, {})
                for resource, amount in spent.items():
                    found[resource] = found.get(resource, 0.0) + amount
        return total

    # --- what is counted by call

    def count(self, tokens: int = 0, flops: float | None = None) -> None:
        """Tell of work that the hook does not see; FLOPs default to the tokens at `flop_rate`, where that is known.

        (Of an encoder-decoder model to tokens of the decoder.)
        """
        self._tokens_by.add(Instrument.GIVEN)
        self._add(Resource.TOKENS, tokens)
        if flops is not None:
            self._flops_by.add(Instrument.GIVEN)
            self._add(Resource.FLOPS, flops)
        elif self._rate is not None:
            self._count_flops(tokens)

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        batch = _named(module, args, kwargs)
        ids = batch.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() > 2:
            return  # not a language model's batch: its tokens stay not read, unless `count` tells
        self._tokens_by.add(Instrument.COUNT)
        self._count_tokens(ids, batch.get("attention_mask"))
        if not encodes_and_decodes(module):
            self._count_flops(ids.numel())
            return
        written, counted = _written(ids, batch)
        self._count_tokens(written, counted)
        self._count_flops(written.numel(), source=ids.numel())

    def _count_tokens(self, ids: torch.Tensor, mask: Any) -> None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            self._add(Resource.TOKENS, ids.numel())
        elif mask.device.type == "cpu":
            self._add(Resource.TOKENS, int(mask.count_nonzero()))
        else:
            counted = mask.detach().count_nonzero()  # without waiting for the device
            self._waiting = counted if self._waiting is None else self._waiting.to(counted.device) + counted

    @property
    def _rate(self) -> FlopRate | None:
        """The one that was given, else the model's by formula."""
        return self.flop_rate or self._by_formula

    def _count_flops(self, positions: int, source: int = 0) -> None:
        assert self._rate is not None
        self._flops_by.add(self._rate.instrument)
        self._add(Resource.FLOPS, self._rate.flops(positions, source))

    def _add(self, resource: Resource, amount: float) -> None:
        self._sums[self._process, resource] += amount

    # --- what is sampled

    @property
    def _process(self) -> str:
        return f"{self._host}/{self._id}"

    def _find_sensors(self) -> None:
        held = accelerators_of(self.model.parameters()) if self.model is not None else []
        self._devices = sorted({*self._given, *held}, key=str)
        domains = rapl_domains(self._powercap, self._host)
        self._counters = [*nvidia_devices(self._devices), *domains]
        self._missing = self._missing_parts()
        self._hardware = {device_id(device): device_name(device) for device in self._devices}
        self._hardware[self._host] = processor_name()

    def _missing_parts(self) -> set[str]:
        parts = [counter.part for counter in self._counters]
        return {
            name
            for name, read in {
                "accelerator": parts.count("accelerator") == len(self._devices),
                "processor": "processor" in parts or self.processor_watts is not None,
                "memory": "memory" in parts or self.memory_watts is not None,
            }.items()
            if not read
        }

    def _watch(self, ended: threading.Event) -> None:
        # At uneven times: samples in step with the training steps would always see the same moment of them.
        uneven = random.Random(self._id)  # noqa: S311 - nothing secret
        while not ended.wait(self.interval * uneven.uniform(0.5, 1.5)):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            now, processor = time.perf_counter(), processor_seconds()
            seconds, worked = now - self._last_time, processor - self._last_processor
            memory, state = self._memory()
            self._sums["wall", Resource.SECONDS] += seconds
            self._add(Resource.PROCESSOR_HOURS, worked / HOUR)
            for device in self._devices:
                self._sums[device_id(device), Resource.ACCELERATOR_HOURS] += seconds / HOUR
            self._add(Resource.VRAM_GB_HOURS, (memory + self._last_memory) / 2 / GB * seconds / HOUR)
            self._add(Resource.OPTIMIZER_GB_HOURS, (state + self._last_state) / 2 / GB * seconds / HOUR)
            self._sample_energy(seconds, worked)
            self._last_time, self._last_processor = now, processor
            self._last_memory, self._last_state = memory, state

    def _sample_energy(self, seconds: float, worked: float) -> None:
        for counter in list(self._counters):
            self._sums[counter.sensor, Resource.ENERGY_KWH] += self._read(counter, seconds) / JOULES_PER_KWH
        parts = {counter.part for counter in self._counters}
        if self.processor_watts is not None and "processor" not in parts:
            joules = self.processor_watts / cores_of_machine() * worked
            self._sums[f"{self._process}/processor", Resource.ENERGY_KWH] += joules / JOULES_PER_KWH
        if self.memory_watts is not None and "memory" not in parts:
            self._sums[f"{self._host}/memory", Resource.ENERGY_KWH] += self.memory_watts * seconds / JOULES_PER_KWH

    def _read(self, counter: EnergyCounter, seconds: float) -> float:
        try:
            return counter.joules(seconds)
        except OSError:  # a device that fell off the bus: what it drew so far stays, the rest is missing
            self._counters.remove(counter)
            self._missing.add(counter.part)
            return 0.0

    def _memory(self) -> tuple[float, float]:
        """(allocated bytes, those of the optimizer's state among them)."""
        allocated = allocated_bytes(self._devices) if self._devices else resident_bytes() or 0
        return allocated, optimizer_bytes(self.optimizer) if self.optimizer is not None else 0

    # --- the tally

    def tally(self) -> Tally:
        """What was spent until now, by this process and by those whose state was loaded."""
        own = self._own_tally()
        if self._earlier is None:
            return own
        return merge_tallies([self._earlier, own]) if own.spans else self._earlier

    def tally_of_ranks(self) -> Tally:
        """The tally of all ranks of torch.distributed, the same on each; every rank has to call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.tally()
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self.tally().model_dump_json())
        return merge_tallies([Tally.model_validate_json(tally) for tally in gathered])

    def _own_tally(self) -> Tally:
        if self._started is None:
            return Tally()
        if self.running:
            self._sample()
        if self._waiting is not None:
            self._add(Resource.TOKENS, int(self._waiting))
            self._waiting = None
        ended = max(self._started, time.time() if self.running else self._paused)
        with self._lock:
            sums = dict(self._sums)
        if self.carbon_intensity is not None:
            for (sensor, resource), amount in list(sums.items()):
                if resource is Resource.ENERGY_KWH:
                    sums[sensor, Resource.CARBON_KG] = amount * self.carbon_intensity / 1e3
        methods = self._methods()
        return settle(
            [
                Span(sensor=sensor, resource=resource, started=self._started, ended=ended, amount=amount)
                for (sensor, resource), amount in sums.items()
                if resource in methods
            ],
            methods,
            region=self.region,
            carbon_intensity=self.carbon_intensity,
            hardware=self._hardware,
        )

    def _methods(self) -> dict[Resource, Method]:
        """How the figures come about; a resource that is not among them was not read."""
        methods = {
            Resource.SECONDS: Method(basis=Basis.MEASURED, instruments=(Instrument.CLOCK,)),
            Resource.PROCESSOR_HOURS: Method(basis=Basis.MEASURED, instruments=(Instrument.PROCESSOR_TIME,)),
        }
        if self._devices:
            methods[Resource.ACCELERATOR_HOURS] = Method(basis=Basis.MEASURED, instruments=(Instrument.CLOCK,))
            methods[Resource.VRAM_GB_HOURS] = Method(basis=Basis.MEASURED, instruments=(Instrument.ALLOCATOR,))
        elif resident_bytes() is not None:
            methods[Resource.VRAM_GB_HOURS] = Method(basis=Basis.MEASURED, instruments=(Instrument.RESIDENT_SET,))
        if self.optimizer is not None:
            state = Method(basis=Basis.MEASURED, instruments=(Instrument.OPTIMIZER_STATE,))
            methods[Resource.OPTIMIZER_GB_HOURS] = state
        energy = self._energy_method()
        if energy is not None:
            methods[Resource.ENERGY_KWH] = energy
            if self.carbon_intensity is not None:
                basis = Basis.PARTIAL if energy.basis is Basis.PARTIAL else Basis.ESTIMATED
                instruments = tuple(sorted({*energy.instruments, Instrument.CARBON_INTENSITY}))
                methods[Resource.CARBON_KG] = Method(basis=basis, instruments=instruments, missing=energy.missing)
        if self._tokens_by:
            methods[Resource.TOKENS] = Method(basis=Basis.MEASURED, instruments=tuple(sorted(self._tokens_by)))
        if self._flops_by:
            basis = Basis.MEASURED if self._flops_by == {Instrument.GIVEN} else Basis.ESTIMATED
            methods[Resource.FLOPS] = Method(basis=basis, instruments=tuple(sorted(self._flops_by)))
        return methods

    def _energy_method(self) -> Method | None:
        parts = {counter.part for counter in self._counters}
        estimates = set()
        if self.processor_watts is not None and "processor" not in parts:
            estimates.add(Instrument.PROCESSOR_WATTS)
        if self.memory_watts is not None and "memory" not in parts:
            estimates.add(Instrument.MEMORY_WATTS)
        instruments = estimates | {counter.instrument for counter in self._counters}
        if not instruments:
            return None
        basis = Basis.PARTIAL if self._missing else Basis.ESTIMATED if estimates else Basis.MEASURED
        return Method(basis=basis, instruments=tuple(sorted(instruments)), missing=tuple(sorted(self._missing)))

    # --- its own state

    def arguments(self) -> dict[str, Any]:
        """What makes another like it, but for model and optimizer, as plain JSON."""
        return {
            "region": self.region,
            "carbon_intensity": self.carbon_intensity,
            "processor_watts": self.processor_watts,
            "memory_watts": self.memory_watts,
            "devices": [str(device) for device in self._given],
            "flop_rate": None if self.flop_rate is None else asdict(self.flop_rate),
            "interval": self.interval,
            "powercap": str(self._powercap),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was spent so far, as plain JSON."""
        return {"format": STATE_FORMAT, "tally": self.tally().model_dump(mode="json"), "parts": self._parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. What this meter has counted itself since then stays: spending is not undone."""
        if state["format"] != STATE_FORMAT:
            raise ConfigurationError(f"the meter's state has format {state['format']}, not {STATE_FORMAT}")
        self.add_earlier(Tally.model_validate(state["tally"]))
        for process, parts in state["parts"].items():
            for name, spent in parts.items():
                kept = self._parts.setdefault(process, {}).setdefault(name, {})
                for resource, amount in spent.items():  # of two states of a process the later has the more
                    kept[resource] = max(amount, kept.get(resource, 0.0))

    def add_earlier(self, tally: Tally) -> None:
        """Count what another process has spent. The same spans told twice count once."""
        self._earlier = tally if self._earlier is None else merge_tallies([self._earlier, tally])

    def save(self, path: Path) -> None:
        """Write the state to a file, which is replaced whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{self._id}")
        unfinished.write_text(json.dumps(self.state_dict()))
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        self.load_state_dict(json.loads(path.read_text()))


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """A call's arguments by the names that `forward` has for them."""
    if len(args) < 2:  # the first is the ids, whatever its name
        return kwargs
    return dict(zip(inspect.signature(unwrapped(module).forward).parameters, args, strict=False)) | kwargs


def _written(ids: torch.Tensor, batch: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """What the decoder is given, (examples, positions), and the mask of what counts of it; None: all."""
    labels, embedded = batch.get("labels"), batch.get("decoder_inputs_embeds")  # (examples, positions, width)
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():  # classes, or none
        labels = None
    mask = batch.get("decoder_attention_mask")
    if mask is None and labels is not None:
        mask = labels != IGNORED
    for given in (batch.get("decoder_input_ids"), None if embedded is None else embedded[..., 0], labels):
        if given is not None:
            return given, mask
    return ids, batch.get("attention_mask") if mask is None else mask  # the encoder's, as BART does it
