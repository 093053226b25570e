"""The tensors of a model as a blueprint lists them, tied ones once, and which of them are free to be trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Layer
from gradient_blueprints.training.profiling.layers import check_names
from gradient_blueprints.training.selection.indices import prefixes

_LEFT = "_left_by_selection"
"""Where a model keeps the names of the tensors that `apply_selection` left to train and of those that it froze: a next
selection may have these, unlike those that its owner froze. On the model, so that a copy of it knows them too."""


@dataclass(frozen=True)
class ListedTensor:
    """A tensor that may be trained, and the layer of the blueprint that lists it."""

    layer: str
    listed_as: str
    """The name by which the layer lists it: of a tied tensor it may be another than the model's first."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelTensors:
    """Tensors of a model by the names of `named_parameters`."""

    listed: dict[str, ListedTensor]
    fixed: tuple[str, ...]
    """Names, as listed, of those in the blueprint's layers that are frozen or hold no floating-point numbers."""
    also: dict[str, int]
    """Sizes of those that are trained whole beside the blueprint's."""
    copies: bool
    """Whether weights that may be trained are of a lower precision than float32."""


def tensors_of(model: nn.Module, layers: Set[str], also_train: Sequence[str] = ()) -> ModelTensors:
    """The model's tensors in the blueprint's `layers`, and those that `also_train` names (see `select`).

    Warns of layers that the model does not have; raises ConfigurationError when it has none of them that may be
    trained, or nothing of an entry of `also_train`.
    """
    fixed, listed, also = [], {}, {}
    unused, missing, copies = set(also_train), set(layers), False
    frozen = kept_fixed(model)
    for names, parameter in tied_names(model):
        missing.difference_update(prefix for name in names for prefix in prefixes(name))
        found = listing(names, layers)
        if names[0] in frozen:
            if found is not None:
                fixed.append(found[0])
            continue
        asked = {entry for entry in also_train for name in names if _names(entry, name)}
        unused -= asked
        if asked:
            also[names[0]] = parameter.numel()
        elif found is not None:
            listed[names[0]] = ListedTensor(found[1], found[0], tuple(parameter.shape))
        copies |= bool(asked or found) and parameter.dtype.itemsize < 4
    if unused:
        raise ConfigurationError(f"also_train: nothing in the model that may be trained is named {min(unused)!r}")
    if not listed:
        why = "everything that it lists is frozen" if fixed else "are its tensors named otherwise?"
        raise ConfigurationError(f"the blueprint lists nothing that may be trained in this model: {why}")
    if missing:
        warnings.warn(
            f"{len(missing)} of the blueprint's {len(layers)} layers are not in the model and are left out: "
            f"{some(sorted(missing))}",
            stacklevel=3,
        )
    return ModelTensors(listed, tuple(fixed), also, copies)


def warn_of_other_sizes(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Warn where the blueprint counts other parameters in its layers than the model has: it is of another model."""
    ids = {layer.id for layer in layers}
    counted: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = listing([name], ids)
        if found is not None and parameter.is_floating_point():  # others are packed: their sizes tell nothing
            counted[found[1]] = counted.get(found[1], 0) + parameter.numel()
    others = [
        f"{layer.id} ({layer.parameters:,}, here {counted[layer.id]:,})"
        for layer in layers
        if layer.parameters and counted.get(layer.id, layer.parameters) != layer.parameters
    ]
    if others:
        warnings.warn(
            f"the blueprint counts other parameters than this model has in {some(others)}. Unless the vocabulary or a "
            "head was changed, it is of another model, and its norms say nothing of this one",
            stacklevel=3,
        )


def tied_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all its names; the first is that of `named_parameters`."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    check_names(name for names, _ in found.values() for name in names)
    return list(found.values())


def listing(names: Sequence[str], layers: Set[str]) -> tuple[str, str] | None:
    """The first of a tensor's names that a layer lists, and that layer, the narrowest."""
    return next(((name, prefix) for name in names for prefix in prefixes(name) if prefix in layers), None)


def kept_fixed(model: nn.Module) -> set[str]:
    """Names of the tensors that are not to be trained: frozen, though not by a selection, or not floating-point.

    Raises ConfigurationError where that cannot be told: for a model with adapters of peft, and for one of which some
    tensors were frozen or set free since the last selection.
    """
    adapted = [
        name
        for name, module in model.named_modules()
        if any(each.__name__ == "BaseTunerLayer" for each in type(module).__mro__)
    ]
    if adapted:
        raise ConfigurationError(
            f"the model has adapters of peft, at {some(adapted)}, and a selection is of the model's own weights: "
            "merge_and_unload() or unload() them first. Adapters that follow a blueprint or a selection: to_peft"
        )
    by_selection = _frozen_by_selection(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or not (parameter.requires_grad or name in by_selection)
    }


def freeze(model: nn.Module, chosen: Set[str]) -> None:
    """Train the chosen tensors; freeze the others until another selection has them. What its owner froze stays so."""
    by_selection = _frozen_by_selection(model)
    free = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in by_selection
    ]
    for name, parameter in free:
        parameter.requires_grad_(name in chosen)
    setattr(model, _LEFT, (frozenset(chosen), frozenset(name for name, _ in free if name not in chosen)))


def release_selection(model: nn.Module) -> None:
    """Set free what the last selection trained or froze. What you had frozen before stays so; freeze more after it."""
    trained, frozen = getattr(model, _LEFT, (frozenset(), frozenset()))
    for name, parameter in model.named_parameters():
        if name in trained | frozen:
            parameter.requires_grad_(True)
    setattr(model, _LEFT, (frozenset(), frozenset()))


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _frozen_by_selection(model: nn.Module) -> set[str]:
    """Names of what the last selection froze, unless it was set free since."""
    trained, frozen = getattr(model, _LEFT, (frozenset(), frozenset()))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters() if name in trained | frozen}
    changed = sorted(name for name, trainable in flags.items() if trainable != (name in trained))
    still = {name for name in frozen if not flags.get(name, True)}
    if changed and still:
        raise ConfigurationError(
            f"frozen or set free since the last selection, by you or by peft: {some(changed)}. What may be trained now "
            "cannot be told: call release_selection(model), then freeze what is to stay as it is"
        )
    return still


def _names(entry: str, parameter: str) -> bool:
    return any(fnmatchcase(prefix, entry) for prefix in prefixes(parameter))
