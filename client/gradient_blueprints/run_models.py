"""The wire types of runs: what training spent, Γ, and by which instrument each figure was read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.models import NonNegative, Text, Wire

MAX_SPANS = 10_000
SensorName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Resource(StrEnum):
    """What training spends. Each has a figure in a `Tally`, or is named there as not read."""

    SECONDS = "seconds"
    PROCESSOR_HOURS = "processor_hours"
    ACCELERATOR_HOURS = "accelerator_hours"
    ENERGY_KWH = "energy_kwh"
    CARBON_KG = "carbon_kg"
    VRAM_GB_HOURS = "vram_gb_hours"
    OPTIMIZER_GB_HOURS = "optimizer_gb_hours"
    FLOPS = "flops"
    TOKENS = "tokens"


class Basis(StrEnum):
    """How far a figure can be trusted."""

    MEASURED = "measured"
    """Counted, or read off an instrument."""
    ESTIMATED = "estimated"
    """Computed from a figure that was given or assumed."""
    PARTIAL = "partial"
    """Some part could not be read (`Method.missing`): a lower bound."""
    NOT_READ = "not_read"
    """No figure; never zero."""


class Instrument(StrEnum):
    """By what a figure was read. Runs are comparable when theirs are the same."""

    CLOCK = "clock"
    PROCESSOR_TIME = "processor_time"
    NVML_COUNTER = "nvml_counter"
    """The energy counter of an NVIDIA device (Volta and later)."""
    NVML_POWER = "nvml_power"
    """Power of an NVIDIA device, sampled and summed over time."""
    RAPL = "rapl"
    """The energy counters of processor packages and memory, Linux powercap."""
    PROCESSOR_WATTS = "processor_watts"
    """Processor time × the watts that were given (estimated)."""
    MEMORY_WATTS = "memory_watts"
    """Time × the watts that were given (estimated)."""
    ALLOCATOR = "allocator"
    """Bytes that torch's allocator has handed out on the accelerator, sampled and summed over time."""
    RESIDENT_SET = "resident_set"
    """Resident memory of the process, where there is no accelerator; sampled and summed over time."""
    OPTIMIZER_STATE = "optimizer_state"
    """Bytes of the tensors in the optimizer's state, sampled and summed over time."""
    CARBON_INTENSITY = "carbon_intensity"
    """Energy × g CO2e per kWh that was given."""
    FLOP_COUNTER = "flop_counter"
    """One step counted by torch.utils.flop_counter, times the tokens."""
    FLOP_FORMULA = "flop_formula"
    """6·N a token; with a share k of the parameters trained 6·N·(2/3 + k/3)."""
    COUNT = "count"
    GIVEN = "given"
    """Told by the caller."""


class Method(Wire):
    """How one figure of a tally came about."""

    basis: Basis
    instruments: tuple[Instrument, ...] = Field((), description="sorted; several where processes or parts differ")
    missing: tuple[Annotated[str, StringConstraints(max_length=64)], ...] = Field(
        (), description="parts that could not be read, sorted: accelerator, processor, memory"
    )

    def comparable(self, other: Method) -> bool:
        """Whether figures of both may be set against each other: read, by the same instruments, of the same parts."""
        read = self.basis is not Basis.NOT_READ and other.basis is not Basis.NOT_READ
        return read and self.instruments == other.instruments and self.missing == other.missing


class Span(Wire):
    """What one sensor counted between two moments.

    A sensor belongs to a machine, a device or a process. Of two spans with the same sensor, resource and start the
    one that ends later is the same count read again, and replaces the other.
    """

    sensor: SensorName = Field(description="unique in the world, such as GPU-8f6a..., HOST/package-0 or HOST/PROCESS")
    resource: Resource
    started: NonNegative = Field(description="seconds since 1970")
    ended: NonNegative
    amount: NonNegative = Field(description="in the unit of the resource; hours, kWh, kg, 10^9 bytes x hours")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.ended < self.started:
            raise PydanticCustomError("interval_order", "ended lies before started")
        return self


def _methods_name_all(methods: dict[Resource, Method]) -> dict[Resource, Method]:
    not_read = Method(basis=Basis.NOT_READ)
    return {resource: methods.get(resource, not_read) for resource in Resource}


class Tally(Wire):
    """What was spent so far. A figure that could not be read is absent, and `methods` says how the others were."""

    seconds: NonNegative | None = Field(
        None, description="wall time, pauses left out; processes side by side count once"
    )
    processor_hours: NonNegative | None = Field(None, description="processor time of all processes")
    accelerator_hours: NonNegative | None = Field(None, description="wall hours x devices; absent without any")
    energy_kwh: NonNegative | None = None
    carbon_kg: NonNegative | None = Field(None, description="kg CO2e")
    vram_gb_hours: NonNegative | None = Field(
        None, description="allocated memory over time, 10^9 bytes x hours, the optimizer's state among it"
    )
    optimizer_gb_hours: NonNegative | None = Field(None, description="of which the optimizer's state")
    flops: NonNegative | None = None
    tokens: Annotated[float, Field(ge=0, le=MAX_SAFE_INTEGER)] | None = Field(None, description="tokens trained on")
    methods: Annotated[dict[Resource, Method], AfterValidator(_methods_name_all)] = Field(
        default_factory=dict, validate_default=True
    )
    region: Text | None = Field(None, description="where the power was drawn; several joined by '; '")
    carbon_intensity: NonNegative | None = Field(None, description="g CO2e per kWh; absent where processes differ")
    hardware: dict[SensorName, Text] = Field(
        default_factory=dict, description="name of each device in use by its sensor, the processors among them"
    )
    spans: Annotated[tuple[Span, ...], Field(max_length=MAX_SPANS)] = Field(
        (), description="what the figures are sums of; absent for figures that were told and not metered"
    )

    @model_validator(mode="after")
    def _figures_have_methods(self) -> Self:
        for resource in Resource:
            read = self.methods[resource].basis is not Basis.NOT_READ
            if read != (getattr(self, resource) is not None):
                raise PydanticCustomError(
                    "method_mismatch",
                    "{resource}: a figure needs the method by which it was read, and not_read goes with none",
                    {"resource": resource.value},
                )
        return self

    def amounts(self) -> dict[Resource, float]:
        """The figures that were read."""
        return {resource: value for resource in Resource if (value := getattr(self, resource)) is not None}

    def told(self) -> Tally:
        """Without spans and without the names of sensors, which are those of machines: what may be published."""
        names = {str(number): name for number, name in enumerate(self.hardware.values(), 1)}
        return self.model_copy(update={"spans": (), "hardware": names})

    def model_card(self, training_type: Literal["pre-training", "fine-tuning"] | None = None) -> str:
        """What to paste into a Hugging Face model card: its metadata, and the disclosure for people.

        A tally does not know its training's type: the metadata have the one that is given.
        """
        from gradient_blueprints.carbon import model_card  # it reads this type

        return model_card(self, training_type)


class RunPoint(Wire):
    """One point of a run's curve: the score Ψ and everything spent up to it, Γ."""

    step: Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
    psi: float
    gamma: Annotated[dict[Resource, NonNegative], Field(min_length=1)] = Field(description="as Tally.amounts gives it")
