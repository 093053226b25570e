"""The wire types of selecting layers (Algorithm 1 on the server)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gradient_blueprints.models import Checkpoint, Digest, LabName, LayerId, ModelId, NonNegative, Share, Wire
from gradient_blueprints.statistics_models import LocalSample, Verdict

SelectionUnit = Literal["coordinate", "row", "layer"]


class BudgetMeasure(StrEnum):
    FRACTION = "fraction"
    PARAMETERS = "parameters"
    BYTES = "bytes"


class Criterion(StrEnum):
    """What a layer is worth."""

    NORM = "norm"
    SIGNAL = "signal"
    FIRST_ORDER = "first_order"
    SIZE_NORMALISED = "size_normalised"
    ABSOLUTE = "absolute"


class SelectionBudget(Wire):
    """A fraction of the parameters, a number of them, or bytes of training memory (moments, gradients, indices)."""

    amount: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
    measure: BudgetMeasure = BudgetMeasure.FRACTION

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.measure is BudgetMeasure.FRACTION and self.amount > 1:
            raise PydanticCustomError(
                "fraction",
                "a fraction is at most 1, got {amount}; 10 % is 0.1, and parameters or bytes are another measure",
                {"amount": f"{self.amount:g}"},
            )
        return self


def format_bytes(size: int) -> str:
    """A size for people, in powers of 1000.

    >>> format_bytes(640), format_bytes(124_560), format_bytes(12_345_678)
    ('640 B', '124.6 kB', '12.3 MB')
    """
    if abs(size) < 1e3:
        return f"{size} B"
    return f"{size / 1e3:,.1f} kB" if abs(size) < 1e6 else f"{size / 1e6:,.1f} MB"


class SelectionRequest(Wire):
    """Local norms and a budget."""

    budget: SelectionBudget
    local: LocalSample | None = Field(None, description="norms of a local sample; its statistic is the criterion's")
    unit: SelectionUnit = Field("coordinate", description="per-layer fractions, or whole layers")
    criterion: Literal[Criterion.NORM, Criterion.SIGNAL, Criterion.FIRST_ORDER, Criterion.SIZE_NORMALISED] = (
        Criterion.NORM
    )
    trust: Share | None = Field(
        None,
        description="weight of the published side, less what the verdict takes; else from agreement and intervals",
    )
    verdict: Verdict | None = Field(None, description="of a staleness check: stale takes the published side's weight")
    groups: dict[str, tuple[LayerId, ...]] | None = Field(
        None, description="of a staleness check whose advice is coarsen; layers in none of them make up one more"
    )
    version: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = Field(
        None, description="of the blueprint; else the owner's newest"
    )
    lab: LabName | None = None


class LayerShare(Wire):
    """What one layer gets."""

    id: LayerId
    parameters: int
    fraction: Share = Field(description="of each of its tensors that is trained")
    share: NonNegative = Field(description="of the blended gradient, G' of Algorithm 1")
    selected: int


class LayerSelection(Wire):
    """What to train, between layers: which whole layers, or which fraction of each."""

    model_id: ModelId
    training_checkpoint: Checkpoint
    version: int
    lab: LabName
    digest: Digest
    unit: SelectionUnit
    criterion: Criterion
    trust: Share
    exact: bool = Field(description="false: the search for the best whole layers was cut short")
    parameters: int
    selected: int
    training_bytes: int = Field(description="moments, gradients and indices of what is selected, float32 weights")
    full_bytes: int = Field(description="the same of a full AdamW update")
    layers: tuple[LayerShare, ...]
