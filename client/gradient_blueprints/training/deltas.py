"""A fine-tuned selection as a small file: the changed coordinates, applied, removed, stacked and merged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.layers import check_names
from gradient_blueprints.training.selection import Selection
from gradient_blueprints.training.selection.indices import NOT_WHOLE, pack, unpack
from gradient_blueprints.training.selection.listed_tensors import listing, tied_names

DELTA_FORMAT = 1
_LOAD_MODELS = (
    "If a checkpoint names its tensors otherwise than the model, load it with from_pretrained and give the model"
)
_CLONE = (
    "is the same memory in base and tuned, so that training changed both: clone the base before training, {name: "
    "tensor.clone() for name, tensor in model.state_dict().items()}, or load it anew"
)
_KEEP_OR_LOAD = "merge() keeps the weights as they are; for the base load it anew and make a new DeltaStack"
Weights = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Change:
    """What changed in one tensor: the new values, exact and in its own precision, not differences.

    A difference added to the weight would be rounded once more; differences for stacking are taken when applied.
    """

    indices: Tensor
    """Flat, ascending, int64."""
    values: Tensor
    base: str
    """SHA-256 of the whole tensor that it is a change of: shape, precision, bytes. Of a tensor that is saved whole, as
    those of `also_train` are, its shape and precision alone."""


@dataclass(frozen=True, eq=False)
class Delta:
    """A fine-tuning as the changes that it made."""

    changes: Mapping[str, Change]
    blueprint_digest: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read what `save_delta` wrote; ConfigurationError when the file holds no whole delta."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("delta", "{}"))
                if header.get("format") != DELTA_FORMAT:
                    raise ConfigurationError(f"{path} holds no delta, or one of another version of this package")
                changes = {
                    name: Change(
                        torch.from_numpy(unpack(file.get_tensor(f"{name}/indices").numpy())),
                        file.get_tensor(f"{name}/values").clone(),  # the file may be replaced while it is mapped
                        base,
                    )
                    for name, base in header["base"].items()
                }
                return cls(changes, header["blueprint_digest"])
        except NOT_WHOLE as error:
            raise ConfigurationError(f"{path} holds no whole delta: {error}") from error

    @property
    def changed(self) -> int:
        """Coordinates that changed."""
        return sum(change.indices.numel() for change in self.changes.values())


def save_delta(base: Weights, tuned: Weights, selection: Selection | None, path: str | Path) -> Path:
    """Write the coordinates in which `tuned` differs from `base`, bit by bit, as one safetensors file.

    `base` and `tuned` are models, or mappings of tensors by name such as `safetensors.torch.load_file` of a checkpoint.
    A tensor that has several names (a tied head) is saved under its first. Those of `also_train` are saved whole, and
    the base need not have them: a new head is random at each load. Of the base what the selection does not list may be
    missing in `tuned`: the old head. The two may be on different devices; they are compared on the CPU.
    With a selection nothing else may have changed: ConfigurationError otherwise, when names or shapes differ, when a
    buffer that is saved with its model changed, such as a batch norm's mean (mappings alone do not tell buffers: give
    a model on one side), for shards (gather them first), and where a tensor that the selection trains, or without a
    selection every tensor, is the same memory on both sides, as in a `state_dict()` from before training.
    """
    _check_buffers(base, tuned)
    before, after = _tensors(base, tuned), _tensors(tuned, base)
    names_before, names_after = _names(before), _names(after)
    layers = {} if selection is None else {layer.id: layer for layer in selection.layers}
    listed = {  # the blueprint may list a name that a checkpoint left out: take the side that has more of them
        name: listing(max(names_before.get(name, []), names_after.get(name, []), key=len), layers.keys())
        for name in before | after
    }
    whole = {name for name, found in listed.items() if found is not None and layers[found[1]].beside_budget}
    added = [name for name in _first(names_after) if name not in before and name not in whole]
    if added:
        raise ConfigurationError(f"{added[0]} is not in the base, {len(added)} tensors in all. {_LOAD_MODELS}")
    missing = [name for name in _first(names_before) if name not in after and (selection is None or listed[name])]
    if missing:
        raise ConfigurationError(f"{missing[0]} is not in the tuned weights, {len(missing)} tensors in all: one shard?")
    shared = {name for name, tensor in after.items() if name in before and _same_memory(before[name], tensor)}
    if selection is None and shared and shared.issuperset(name for name, tensor in after.items() if tensor.numel()):
        raise ConfigurationError(f"{min(shared)} {_CLONE}")
    contents: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name in _first(names_after):
        new = after[name].cpu()
        changed = torch.arange(new.numel()) if name in whole else _changed(name, before[name], new)
        if selection is not None:
            found = listed[name]
            allowed = selection.indices(name if found is None else found[0], tuple(new.shape))
            if name in shared and name not in whole and (allowed is None or len(allowed)):
                raise ConfigurationError(f"{name} {_CLONE}")
            outside = np.ones(new.numel(), np.bool_)
            outside[slice(None) if allowed is None else allowed] = False
            if outside[changed.numpy()].any():
                raise ConfigurationError(
                    f"{name} changed outside the selection. {_LOAD_MODELS}, as where it is a buffer; else "
                    "selection=None saves all that changed"
                )
        if len(changed):
            contents[f"{name}/indices"] = torch.from_numpy(pack(changed.numpy()).copy())
            contents[f"{name}/values"] = new.flatten()[changed]
            digests[name] = _form(new) if name in whole else digest_of(before[name])
    header = {
        "format": DELTA_FORMAT,
        "blueprint_digest": None if selection is None else selection.blueprint_digest,
        "base": digests,
    }
    save_file(contents, str(path), metadata={"delta": json.dumps(header)})
    return Path(path)


class DeltaStack:
    """A model that deltas are put on and taken off.

    >>> stack = DeltaStack(model)                           # doctest: +SKIP
    >>> stack.apply("code", Delta.load("code.safetensors"))  # doctest: +SKIP
    >>> stack.remove("code")    # the original, bit by bit   # doctest: +SKIP

    A coordinate that one delta of weight 1 touches has that delta's value exactly; where several do, or the weight is
    another, it is base + Σ weight·(value − base), in float32 (float64 for wider weights), rounded once. The original
    values of the touched coordinates are kept, so the order of applying and removing is no matter.

    While a delta is on, the precision has to stay, and so have the values that it gave: `apply` and `remove` refuse
    after training or loading has changed one of them, since the originals of a model that is no more would be put over
    it. Only the touched coordinates are compared. What changed beside them stays when the delta is removed, and in the
    base whose digest a next delta has to have, which is taken anew.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._applied: dict[str, tuple[Delta, float]] = {}
        self._originals: dict[str, tuple[Tensor, Tensor]] = {}  # indices, values
        self._parameters()

    @property
    def applied(self) -> dict[str, float]:
        """Names and weights of the deltas that are on."""
        return {name: weight for name, (_, weight) in self._applied.items()}

    def apply(self, name: str, delta: Delta, weight: float = 1.0) -> None:
        """Put a delta on. ConfigurationError, and nothing changed, unless it was made for these tensors as they are."""
        if name in self._applied:
            raise ConfigurationError(f"{name!r} is applied already: remove it first")
        if not math.isfinite(weight):
            raise ConfigurationError(f"the weight of {name!r} is {weight}: give a finite number")
        parameters, delta = self._parameters(), self._by_first_names(name, delta)
        for tensor, change in delta.changes.items():
            if tensor not in parameters:
                raise ConfigurationError(self._without(name, tensor))
            weights = parameters[tensor]
            if change.base != _form(weights) and change.base != self._base_digest(tensor, weights):
                raise ConfigurationError(f"{name!r} was made for another model: {tensor} is not what it is a change of")
            if not _fits(change, weights):
                raise ConfigurationError(
                    f"{name!r} is damaged: its indices or values do not fit {tensor}. Save it anew, or fetch it again"
                )
        self._applied[name] = delta, weight
        self._rewrite(delta, parameters)

    def remove(self, name: str) -> None:
        """Take a delta off. ConfigurationError, and nothing changed, when it is not on or the weights are others."""
        if name not in self._applied:
            raise ConfigurationError(f"{name!r} is not applied; there is {', '.join(self._applied) or 'nothing'}")
        parameters = self._parameters()
        delta, _ = self._applied.pop(name)
        self._rewrite(delta, parameters)

    def merge(self) -> None:
        """Keep the weights as they are now, for good: what was applied can no longer be removed."""
        self._applied.clear()
        self._originals.clear()

    def _parameters(self) -> dict[str, Tensor]:
        """The model's parameters of now; ConfigurationError unless the deltas that are on are on them, bit for bit."""
        found: dict[str, Tensor] = {name: each.detach() for name, each in self._model.named_parameters()}
        check_names(found)
        _check_whole(found)
        for tensor, (indices, values) in self._originals.items():
            if tensor not in found:
                raise ConfigurationError(f"{tensor} is gone since a delta was put on it. {_KEEP_OR_LOAD}")
            is_now, was = found[tensor].dtype, values.dtype
            if is_now != was:
                raise ConfigurationError(
                    f"{tensor} is {is_now} now and was {was} when a delta was put on: remove deltas, or merge them, "
                    f"before the precision is changed. {_KEEP_OR_LOAD}"
                )
            if not _holds(found[tensor], indices, _stacked(values, indices, self._changes_of(tensor))):
                raise ConfigurationError(
                    f"{tensor} was trained, loaded or changed otherwise since a delta was put on it, and what that "
                    f"delta replaced is no longer its base. {_KEEP_OR_LOAD}"
                )
        return found

    def _by_first_names(self, name: str, delta: Delta) -> Delta:
        """A delta of a checkpoint that knows a tied tensor by another of its names, or by two."""
        first = {other: names[0] for names, _ in tied_names(self._model) for other in names[1:]}
        changes: dict[str, Change] = {}
        for tensor, change in delta.changes.items():
            known = changes.setdefault(first.get(tensor, tensor), change)
            same = known is change or (
                torch.equal(known.indices, change.indices) and torch.equal(known.values, change.values)
            )
            if not same:
                raise ConfigurationError(
                    f"{name!r} was made for another model: in this {tensor} is the same tensor as "
                    f"{first.get(tensor, tensor)}, and it changes the two otherwise"
                )
        return replace(delta, changes=changes)

    def _without(self, name: str, tensor: str) -> str:
        """What to say of a delta that changes a tensor which is no parameter of the model."""
        if any(tensor == buffer for buffer, _ in self._model.named_buffers(remove_duplicate=False)):
            return (
                f"{name!r} changes {tensor}, a buffer of this model, and deltas are of parameters alone, which "
                "checkpoints do not tell: save it with the model itself as base or tuned, which says what to do"
            )
        return f"{name!r} was made for another model: {tensor} is not in this. {_LOAD_MODELS}"

    def _base_digest(self, tensor: str, weights: Tensor) -> str:
        """Read anew each time: training or loading may have changed the weights meanwhile."""
        if tensor not in self._originals:
            return digest_of(weights)
        indices, values = self._originals[tensor]
        base = weights.to("cpu", copy=True, memory_format=torch.contiguous_format)
        base.view(-1)[indices.cpu()] = values.cpu()
        return digest_of(base)

    def _changes_of(self, tensor: str) -> list[tuple[Change, float]]:
        return [(delta.changes[tensor], weight) for delta, weight in self._applied.values() if tensor in delta.changes]

    @torch.no_grad()
    def _rewrite(self, delta: Delta, parameters: Mapping[str, Tensor]) -> None:
        for name in delta.changes:
            weights = parameters[name]
            flat = weights.reshape(-1)
            self._rewrite_flat(name, flat)
            if not weights.is_contiguous():  # then `flat` is a copy
                weights.copy_(flat.view_as(weights))

    def _rewrite_flat(self, name: str, flat: Tensor) -> None:
        if name in self._originals:
            indices, values = self._originals.pop(name)
            flat[indices.to(flat.device)] = values.to(flat.device)
        changes = self._changes_of(name)
        if not changes:
            return
        sets = [change.indices for change, _ in changes]
        touched = (sets[0] if len(sets) == 1 else torch.unique(torch.cat(sets))).to(flat.device)
        base = flat[touched]
        self._originals[name] = touched, base
        flat[touched] = _stacked(base, touched, changes)


def _stacked(base: Tensor, touched: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
    """New values of the touched coordinates."""
    if len(changes) == 1 and changes[0][1] == 1:
        return changes[0][0].values.to(base.device)
    wide = torch.promote_types(base.dtype, torch.float32)
    total, exact = base.to(wide, copy=True), base.clone()
    voices = torch.zeros(len(touched), dtype=torch.int32, device=base.device)
    for change, weight in changes:
        place = torch.searchsorted(touched, change.indices.to(touched.device))
        values = change.values.to(base.device)
        total[place] += weight * (values.to(wide) - base[place].to(wide))
        exact[place] = values
        voices[place] += 1 if weight == 1 else 2  # another weight: not the value as it is
    return torch.where(voices == 1, exact, total.to(base.dtype))


def _fits(change: Change, weights: Tensor) -> bool:
    """Whether a change has a value of the tensor's precision for each index, and ascending indices within it."""
    indices, values = change.indices, change.values
    if indices.dtype != torch.int64 or indices.dim() != 1 or values.shape != indices.shape:
        return False
    within = (indices[:1] >= 0).all() and (indices[-1:] < weights.numel()).all() and (indices.diff() > 0).all()
    return values.dtype == weights.dtype and bool(within)


def _holds(weights: Tensor, indices: Tensor, values: Tensor) -> bool:
    """Whether a tensor has these values at these ascending flat indices, bit by bit."""
    if len(indices) and indices[-1] >= weights.numel():
        return False
    found = weights.reshape(-1)[indices.to(weights.device)]
    return torch.equal(_bits(found.to(values.device)), _bits(values))


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape, precision and bytes."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(_form(content).encode())
    digest.update(content.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _changed(name: str, old: Tensor, new: Tensor) -> Tensor:
    """Flat indices of what changed, bit by bit; `new` is on the CPU."""
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ConfigurationError(f"{name} has another shape or precision in the base")
    return (_bits(old.cpu()) != _bits(new)).nonzero().flatten()


def _same_memory(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and left.data_ptr() == right.data_ptr() != 0


def _tensors(weights: Weights, other: Weights) -> dict[str, Tensor]:
    """Parameters by each of their names; a mapping without what is a buffer of the other side's model."""
    if isinstance(weights, nn.Module):
        found = {name: each.detach() for name, each in weights.named_parameters(remove_duplicate=False)}
    else:
        buffers = dict(other.named_buffers()) if isinstance(other, nn.Module) else {}
        found = {name: tensor for name, tensor in weights.items() if name not in buffers}
    check_names(found)
    _check_whole(found)
    return found


def _check_buffers(base: Weights, tuned: Weights) -> None:
    """ConfigurationError where training moved a buffer: a delta holds parameters alone, and would leave it away."""
    models = [each for each in (base, tuned) if isinstance(each, nn.Module)]
    names = {name for model in models for name, _ in model.named_buffers()}
    held, new = (each.state_dict() if isinstance(each, nn.Module) else each for each in (base, tuned))
    for name in sorted(names & held.keys() & new.keys()):
        if not new[name].is_floating_point():
            continue
        old = held[name].to(new[name])
        if old.shape != new[name].shape or not torch.equal(_bits(old), _bits(new[name])):
            raise ConfigurationError(
                f"{name} changed, which is a buffer, and a delta holds parameters alone. Train with its module in "
                "evaluation mode, or share the whole checkpoint; copy the base's buffers to leave the change away"
            )


def _names(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """By each name of a tensor all the names that it has, in the order of the mapping."""
    named: dict[object, list[str]] = {}
    found = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        found[name] = named.setdefault(memory if tensor.numel() else name, [])
        found[name].append(name)
    return found


def _first(names: Mapping[str, list[str]]) -> list[str]:
    """Each tensor's first name."""
    return [name for name, found in names.items() if name == found[0]]


def _check_whole(tensors: Mapping[str, Tensor]) -> None:
    """ConfigurationError for shards, and for tensors without contents."""
    shards = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    if shards:
        raise ConfigurationError(
            f"{shards[0]} is sharded (FSDP2), and deltas take whole tensors: gather them first, get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict"
        )
    absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if absent:
        raise ConfigurationError(
            f"{absent[0]} is on the meta device, {len(absent)} tensors in all: not loaded yet, or kept on disk by "
            "accelerate. Load the model whole"
        )


def _bits(tensor: Tensor) -> Tensor:
    """Flat integers of the same bytes, so that -0.0 differs from 0.0 and a NaN is itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(-1).view(kinds[tensor.dtype.itemsize])
