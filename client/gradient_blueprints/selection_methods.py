"""The method of both clients that has the registry choose layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from gradient_blueprints.blueprint_files import read_blueprint
from gradient_blueprints.calls import JSON_BODY, Checkpointish, Connected, built, checkpoint_path, method
from gradient_blueprints.models import Blueprint
from gradient_blueprints.selection_models import (
    BudgetMeasure,
    Criterion,
    LayerSelection,
    SelectionBudget,
    SelectionRequest,
    SelectionUnit,
)
from gradient_blueprints.statistics_methods import LocalValues, local_sample
from gradient_blueprints.statistics_models import LocalSample, Staleness
from gradient_blueprints.transport import Request, Steps, Work


class SelectionMethods(Connected):
    """Selecting layers."""

    @method
    def select_layers(
        self,
        model_id: str,
        checkpoint: Checkpointish,
        budget: float,
        local: LocalSample | LocalValues | Blueprint | str | Path | None = None,
        *,
        measure: BudgetMeasure | Literal["fraction", "parameters", "bytes"] = "fraction",
        unit: SelectionUnit = "coordinate",
        criterion: Criterion | Literal["norm", "signal", "first_order", "size_normalised"] = "norm",
        trust: float | None = None,
        staleness: Staleness | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        version: int | None = None,
        lab: str | None = None,
    ) -> Steps[LayerSelection]:
        """Which fraction of every layer to train, or which whole layers (`unit="layer"`): Algorithm 1 on the server.

        `local` is a number a layer, its batches, a Blueprint of the local data or its file, as for `check_staleness`,
        whose answer goes in `staleness`. Which coordinates within the layers is for `training.selection.select`.
        InvalidRequest tells the least budget that pays, where this one pays for nothing.

            chosen = client.select_layers("foundation-7b", 0.8, 2e9, {"attn.0": [0.05, 0.06], ...}, measure="bytes")
            [(layer.id, layer.fraction) for layer in chosen.layers]
        """
        if isinstance(local, str | Path):
            place = local
            given: LocalSample | LocalValues | Blueprint | None = yield Work(lambda: read_blueprint(place))
        else:
            given = local
        if groups is None and staleness is not None:
            groups = staleness.groups
        request = built(
            SelectionRequest,
            budget=built(SelectionBudget, amount=budget, measure=measure),
            local=None
            if given is None
            else local_sample(given, "signal" if criterion == "signal" else "gradient_norm"),
            unit=unit,
            criterion=criterion,
            trust=trust,
            verdict=None if staleness is None else staleness.verdict,
            groups=None if groups is None else {name: tuple(members) for name, members in groups.items()},
            version=version,
            lab=lab,
        )
        body = request.model_dump_json(exclude_none=True).encode()
        path = checkpoint_path(model_id, checkpoint, "selection")
        answer = yield from self._exchange(Request("POST", path, {}, JSON_BODY, body, repeatable=True))
        return answer.parse(LayerSelection)
