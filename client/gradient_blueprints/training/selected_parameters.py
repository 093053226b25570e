"""A selection on a model: which parts of which tensor are trained here, on whole tensors and on shards of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.selection import Selection, Units
from gradient_blueprints.training.selection.indices import INT32_ENTRIES, Indices
from gradient_blueprints.training.selection.listed_tensors import freeze, kept_fixed, listing, some, tied_names


@dataclass(eq=False)
class SelectedParameter:
    """A tensor of the model and the parts of it that are trained.

    The tensor, or this process's shard of it, counts as (parts, width): coordinates have width 1, rows their inputs.
    """

    name: str
    parameter: nn.Parameter
    indices: torch.Tensor | None
    """Chosen parts, ascending; None means all."""
    width: int = 1
    shard_group: ProcessGroup | None = None
    """The processes over which the tensor is sharded (FSDP2)."""
    of_all_shards: int | None = None
    """Coordinates that are trained in all of them together; None where the tensor is whole."""
    module: nn.Module | None = None
    """The module that has the tensor under the last part of its name; None where it may put others in its place."""

    @property
    def is_replaced(self) -> bool:
        """Whether the module has another tensor now, which nobody trains."""
        now = None if self.module is None else self.module._parameters.get(self.name.rpartition(".")[2])
        return now is not None and now is not self.parameter

    @property
    def selected(self) -> int:
        """Coordinates that are trained here."""
        return local(self.parameter).numel() if self.indices is None else self.indices.numel() * self.width

    @property
    def trained(self) -> int:
        """Coordinates that are trained, here and in the other processes over which the tensor is sharded."""
        return self.selected if self.of_all_shards is None else self.of_all_shards

    def entries(self, tensor: torch.Tensor) -> torch.Tensor:
        """The chosen entries of the tensor or its gradient; with all chosen its own memory where it can be."""
        held = local(tensor)
        if self.indices is None:
            return held.flatten()
        return held.reshape(-1, self.width).index_select(0, self._index_on(held.device))

    def write(self, values: torch.Tensor) -> None:
        """Put the chosen entries back."""
        weights = local(self.parameter.detach())
        if self.indices is None:
            weights.copy_(values.view_as(weights))
        else:
            parts = weights.reshape(-1, self.width)
            parts[self._index_on(weights.device)] = values.to(weights.dtype)
            if not weights.is_contiguous():  # then `parts` is a copy, as with channels_last
                weights.copy_(parts.view_as(weights))

    def _index_on(self, device: torch.device) -> torch.Tensor:
        """The indices, which follow a model that was moved after the selection was applied."""
        assert self.indices is not None
        if self.indices.device != device:
            self.indices = self.indices.to(device)
        return self.indices


def apply_selection(model: nn.Module, selection: Selection) -> list[SelectedParameter]:
    """Freeze what is not selected; what is, is returned for `SelectedAdamW`.

    A tensor of which some parts are selected keeps `requires_grad`: its gradient is computed whole, as it has to be,
    and freed as soon as the chosen entries are read off. After `fully_shard` (FSDP2), not before it; each process then
    trains its own shard.

    What you froze stays frozen; what an earlier selection froze is free again. To freeze more after a selection, call
    `release_selection` first. Warns of tensors that the selection names and you froze, of those that the blueprint does
    not list, which are frozen too (a new head: see `also_train` of `select`), of complex ones, which are frozen, and of
    layers of another size than the selection was made for, where chosen coordinates may be others. Raises
    ConfigurationError when the selection names nothing of this model, for a model with adapters of peft, and where some
    tensors were frozen or set free since the last selection.
    """
    layers = {layer.id for layer in selection.layers}
    fixed = kept_fixed(model)
    chosen: dict[str, SelectedParameter] = {}
    unlisted, refused, complex_numbers = [], [], []
    sizes: dict[str, int] = {}
    for names, parameter in tied_names(model):
        name, found = names[0], listing(names, layers)
        if parameter.is_complex() and parameter.requires_grad:
            complex_numbers.append(name)
            continue
        if found is None:
            unlisted.append(name)
            continue
        units = selection.units(found[0], tuple(parameter.shape))
        if units.indices is not None and len(units.indices) == 0:
            continue
        sizes[found[1]] = sizes.get(found[1], 0) + parameter.numel()
        if name in fixed:
            refused.append(name)
        else:
            chosen[name] = _on_this_process(model, name, parameter, units)
    if not chosen:
        why = "all of it is frozen" if refused else "are its tensors named otherwise?"
        raise ConfigurationError(f"the selection for {selection.model_id} selects nothing in this model: {why}")
    unlisted = [name for name in unlisted if name not in fixed]
    if unlisted:
        warnings.warn(
            f"the selection does not list {some(unlisted)}: frozen as they are. What has to be trained, such as a new "
            "head, is named in select(..., also_train=[...])",
            stacklevel=2,
        )
    others = [layer.id for layer in selection.layers if sizes.get(layer.id, layer.parameters) > layer.parameters > 0]
    if others:
        warnings.warn(
            f"larger than in the model that the selection was made for: {some(others)}. Unless they grew at their end "
            "(new tokens), the chosen coordinates are others: make a selection for this model",
            stacklevel=2,
        )
    if refused:
        warnings.warn(f"selected, but frozen before and left so: {some(refused)}", stacklevel=2)
    if complex_numbers:
        warnings.warn(
            f"complex numbers are not trained here, and frozen: {some(complex_numbers)}",
            stacklevel=2,
        )
    freeze(model, chosen.keys())
    return list(chosen.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or this process's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _on_this_process(model: nn.Module, name: str, parameter: nn.Parameter, units: Units) -> SelectedParameter:
    indices, held = units.indices, local(parameter)
    group = of_all = None
    if isinstance(parameter, DTensor):
        group = _shard_group(name, parameter)
        of_all = parameter.numel() if indices is None else len(indices) * units.width
        if indices is not None:
            _, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            first = offsets[0] * math.prod(parameter.shape[1:]) // units.width if held.numel() else 0
            start, end = np.searchsorted(indices, [first, first + held.numel() // max(1, units.width)])
            indices = indices[start:end] - first
    on_device = None if indices is None else _on_device(indices, held)
    # FSDP itself puts the whole tensor in the shard's place, and may leave it there
    module = None if isinstance(parameter, DTensor) else model.get_submodule(name.rpartition(".")[0])
    return SelectedParameter(name, parameter, on_device, units.width, group, of_all, module)


def _on_device(indices: Indices, held: torch.Tensor) -> torch.Tensor:
    """The indices beside the weights: on the processor those of a ranked tensor are the selection's own, not a copy."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of memory that is not to be written to
        found = torch.from_numpy(indices)
    fits = indices.dtype == np.int32 or held.numel() <= INT32_ENTRIES
    return found.to(held.device, torch.int32 if fits else torch.int64)


def _shard_group(name: str, parameter: DTensor) -> ProcessGroup | None:
    sharded = [(dim, placed) for dim, placed in enumerate(parameter.placements) if not placed.is_replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or not isinstance(sharded[0][1], Shard) or sharded[0][1].dim != 0:
        raise ConfigurationError(
            f"{name} is placed as {parameter.placements}: only tensors sharded once, by their first dimension "
            "(FSDP2's default), can be trained in part"
        )
    return parameter.device_mesh.get_group(sharded[0][0])
