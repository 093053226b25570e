"""The selection: which parameters to train, as an immutable object and a small file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from gradient_blueprints.allocation import BYTES_PER_DENSE_PARAMETER, bytes_each, count
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.selection_models import SelectionUnit, format_bytes
from gradient_blueprints.training.selection.indices import (
    NOT_WHOLE,
    Indices,
    best,
    narrow,
    pack,
    prefixes,
    random_scores,
    unpack,
)

SELECTION_FORMAT = 2


@dataclass(frozen=True)
class SelectedLayer:
    """What was decided for one layer of the blueprint."""

    id: str
    parameters: int
    fraction: float
    """Share of each of its tensors that is trained, in [0, 1]."""
    share: float
    """Blended share of the criterion, G' of Algorithm 1; they sum to 1 over the layers."""
    retained: float | None
    """Share of what `Selection.retained_of` names that lies within the chosen; None where nothing was known."""
    trained: int | None = None
    """Parameters in whole parts of its tensors; None where their shapes were not known."""

    @property
    def selected(self) -> int:
        return count(self.fraction, self.parameters) if self.trained is None else self.trained

    @property
    def beside_budget(self) -> bool:
        """Whether it is a tensor of `also_train`: a budget buys nothing that has no share of the criterion."""
        return self.fraction == 1 and self.share == 0


class Units(NamedTuple):
    """Chosen parts of a tensor seen as (parts, width): single coordinates of width 1, or whole rows."""

    indices: Indices | None
    """Ascending; None means all of the tensor."""
    width: int


@dataclass(frozen=True, eq=False)
class Selection:
    """Which parameters to train: immutable, deterministic, a small file.

    `parts` holds the chosen parts of tensors that were ranked: flat indices, or rows with `unit="row"`; an empty entry
    keeps a tensor out. They take 4 bytes each in tensors below 2³¹ entries, and a training on the processor shares
    them. A tensor without an entry is trained whole where its layer's fraction is 1, else at the parts that `units`
    derives from `seed` and its name.
    """

    model_id: str
    training_checkpoint: float
    blueprint_digest: str
    unit: SelectionUnit
    criterion: str
    score: str
    trust: float
    validity: float
    seed: int
    copies: bool
    """The weights are of a lower precision than float32, so that a float32 copy of the chosen is kept."""
    exact: bool
    layers: tuple[SelectedLayer, ...]
    parts: Mapping[str, Indices]
    random_tensors: int | None = None
    """Tensors of which random parts are trained; None where their shapes were not known."""
    retained_of: Literal["gradient", "score"] = "score"
    """Of what layers retain a share: Σ|g| of the local sample's mean gradient over all their tensors, else the score's
    sum over those that it ranked."""
    columns: Mapping[str, int] = field(default_factory=dict)
    """Entries of a row (`width_of`) of each tensor that was ranked: in a matrix of others a flat index is another
    coordinate. Empty in files of versions that did not write it."""

    def __post_init__(self) -> None:
        frozen = {name: narrow(chosen).view() for name, chosen in sorted(self.parts.items())}
        for chosen in frozen.values():
            chosen.flags.writeable = False
        object.__setattr__(self, "parts", MappingProxyType(frozen))
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))
        object.__setattr__(self, "_by_id", {layer.id: layer for layer in self.layers})

    def __reduce__(self) -> tuple[Callable[[], Selection], tuple[()]]:
        """For pickle and copy: other processes and copied modules take selections along."""
        given = {member.name: getattr(self, member.name) for member in fields(self)}
        return partial(Selection, **given | {"parts": dict(self.parts), "columns": dict(self.columns)}), ()

    def units(self, parameter: str, shape: tuple[int, ...]) -> Units:
        """The chosen parts of a tensor of this shape; raises ConfigurationError where they would be others in it."""
        width = width_of(self.unit, shape)
        layer = self.layer_of(parameter)
        ranked = self.parts.get(parameter)
        if layer is None or layer.fraction == 0:
            return Units(np.empty(0, np.int64), width)
        if layer.fraction == 1 and ranked is None:
            return Units(None, width)
        parts = math.prod(shape) // width if width else 0
        if ranked is not None:
            columns = width_of("row", shape)
            if len(ranked) and len(shape) > 1 and self.columns.get(parameter, columns) != columns:
                raise ConfigurationError(
                    f"{parameter} has the shape {shape}, and rows of {self.columns[parameter]} entries in the model "
                    "that the selection was made for: its coordinates are others. Make a selection for this model"
                )
            if len(ranked) and ranked[-1] >= parts:
                raise ConfigurationError(f"{parameter} has the shape {shape}, less than the selection was made for")
            return Units(ranked, width)
        wanted = parts_of(layer.fraction, shape, width)
        return Units(best(random_scores(parameter, parts, self.seed), wanted, parameter, self.seed), width)

    def indices(self, parameter: str, shape: int | tuple[int, ...]) -> Indices | None:
        """Chosen flat indices, ascending; None means all. By rows it takes the shape; else the size will do."""
        if isinstance(shape, int):
            if self.unit == "row":
                raise ConfigurationError("a selection of rows needs the tensor's shape, not its size")
            shape = (shape,)
        chosen, width = self.units(parameter, shape)
        if chosen is None or width == 1:
            return chosen
        return np.asarray((chosen.astype(np.int64)[:, None] * width + np.arange(width)).ravel())

    def layer_of(self, parameter: str) -> SelectedLayer | None:
        """The layer of the blueprint that lists this tensor."""
        by_id: dict[str, SelectedLayer] = self._by_id  # type: ignore[attr-defined]  # derived, so not a field
        return next((by_id[name] for name in prefixes(parameter) if name in by_id), None)

    @property
    def parameters(self) -> int:
        """Parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def selected(self) -> int:
        """Parameters that are trained, exactly where the shapes of a layer's tensors were known (`model`, or a measured
        gradient); else the true count may be lower by less than one part per tensor."""
        return sum(layer.selected for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """Bytes held through training beyond weights and activations; `SelectedAdamW.training_bytes` measures them."""
        return sum(
            layer.selected * bytes_each("layer" if layer.fraction == 1 else self.unit, copies=self.copies)
            for layer in self.layers
        )

    @property
    def full_bytes(self) -> int:
        """The same of a full AdamW update."""
        return self.parameters * BYTES_PER_DENSE_PARAMETER

    def summary(self, top: int = 8) -> str:
        """The decision as a table for people: the totals and the `top` layers by selected parameters.

        `share` is the layer's of the criterion, `gradient kept` (or `score kept`) as `retained_of` says.
        """
        chosen = sorted((layer for layer in self.layers if layer.selected), key=lambda layer: -layer.selected)
        share = _percent(self.selected / max(1, self.parameters))
        saved = self.full_bytes - self.training_bytes
        sizes = f"training memory {format_bytes(self.training_bytes)}, full AdamW {format_bytes(self.full_bytes)}"
        by = f"by {self.criterion}, within them by {self._within()}; trust in the published side {self.trust:.2f}"
        worthless = [layer.id for layer in self.layers if not layer.share and not layer.fraction and layer.parameters]
        empty = [layer.id for layer in self.layers if layer.fraction and layer.parameters and not layer.selected]
        lines = [
            f"{self.model_id} at {self.training_checkpoint:g}, by {self.unit}",
            f"{self.selected:,} of {self.parameters:,} parameters ({share})",
            f"in {len(chosen)} of {len(self.layers)} layers {by}",
            f"{sizes}: {format_bytes(saved)} saved",
            f"{'layer':<44}{'parameters':>12}{'fraction':>10}{'share':>8}{self.retained_of + ' kept':>15}{'saved':>14}",
        ]
        for layer in chosen[:top]:
            kept = "–" if layer.retained is None else _percent(layer.retained)
            held = layer.selected * bytes_each("layer" if layer.fraction == 1 else self.unit, copies=self.copies)
            lines.append(
                f"{layer.id[-43:]:<44}{layer.parameters:>12,}{_percent(layer.fraction):>10}"
                f"{_percent(layer.share):>8}{kept:>15}{layer.parameters * BYTES_PER_DENSE_PARAMETER - held:>12,} B"
            )
        if len(chosen) > top:
            lines.append(f"and {len(chosen) - top} more layers")
        if worthless and self.unit != "layer":
            lines.append(f"frozen, since their {self.criterion} is 0: {len(worthless)} layers ({worthless[0]}…)")
        if empty:
            lines.append(
                f"frozen, since their fraction is less than one {self.unit}: {len(empty)} layers ({empty[0]}…)"
            )
        if not self.exact:
            lines.append("the search for the best whole layers was cut short: a better choice may exist")
        return "\n".join(lines)

    def _within(self) -> str:
        """The score, and how many tensors it ranked."""
        if self.unit == "layer":
            return self.score
        ranked = sum(len(chosen) > 0 for chosen in self.parts.values())
        by_chance = "the others" if self.random_tensors is None else str(self.random_tensors)
        return f"{self.score} (tensors ranked: {ranked}, at random: {by_chance})"

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file: a header, and per ranked tensor the packed indices of its chosen parts."""
        header = {name: getattr(self, name) for name in _HEADER} | {
            "columns": dict(self.columns),
            "format": SELECTION_FORMAT,
            "layers": [asdict(layer) for layer in self.layers],
        }
        packed = {name: pack(chosen) for name, chosen in self.parts.items()}
        save_file(packed, path, metadata={"selection": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote; ConfigurationError when the file holds no whole selection."""
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {}).get("selection", "{}"))
                if header.pop("format", None) != SELECTION_FORMAT:
                    raise ConfigurationError(f"{path} holds no selection, or one of another version of this package")
                parts = {name: narrow(unpack(file.get_tensor(name))) for name in file.keys()}  # noqa: SIM118 - no mapping
            header["layers"] = tuple(SelectedLayer(**layer) for layer in header["layers"])
            return cls(**header, parts=parts)
        except NOT_WHOLE as error:
            raise ConfigurationError(f"{path} holds no whole selection: {error}") from error


_HEADER = (
    "model_id",
    "training_checkpoint",
    "blueprint_digest",
    "unit",
    "criterion",
    "score",
    "trust",
    "validity",
    "seed",
    "copies",
    "exact",
    "random_tensors",
    "retained_of",
)


def width_of(unit: SelectionUnit, shape: tuple[int, ...]) -> int:
    """Entries of a part of a tensor: a row is a matrix's row, in a stack of matrices (3 dimensions: experts) too.

    It holds the inputs of one output channel where weights are (outputs, inputs), as in nn.Linear, and of a filter all
    its places; the outputs of one input where they are (inputs, outputs), as in GPT-2's Conv1D. A vector's row is one
    entry.
    """
    if unit != "row" or len(shape) < 2:
        return 1
    return shape[-1] if len(shape) == 3 else math.prod(shape[1:])


def parts_of(fraction: float, shape: tuple[int, ...], width: int) -> int:
    """How many parts of `width` entries a fraction of a tensor pays for."""
    return count(fraction, math.prod(shape)) // width if width else 0


def _percent(share: float) -> str:
    return f"{share:.1%}"
