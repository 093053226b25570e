"""Fine-tuning a selection: AdamW whose state, and whose gradients, exist for the chosen coordinates alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, cast, overload

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.gradient_hooks import GradientHook, readers_of
from gradient_blueprints.training.selected_parameters import SelectedParameter, apply_selection, local
from gradient_blueprints.training.selection.listed_tensors import release_selection, some

__all__ = ["SelectedAdamW", "SelectedParameter", "apply_selection", "optimizer_bytes", "release_selection"]

_ALL = "all of the shape"
"""What a state says of a tensor that is trained whole, with the shape."""
_NOT_OF_A_GROUP = {
    "max_norm",
    "process_group",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
}


class SelectedAdamW(torch.optim.Optimizer):
    """AdamW over selected coordinates, equal to dense AdamW whose gradients and decay are masked to them.

    >>> # optimizer = SelectedAdamW(apply_selection(model, selection), lr=1e-3)
    >>> # loss.backward(); optimizer.step(); optimizer.zero_grad()

    During `backward` a hook reads the chosen entries off each tensor's gradient as soon as it is accumulated and
    frees the rest, so no more than one full gradient of one tensor exists at a time (of a tied one those of its uses
    and their sum); under `torch.compile` those of one graph do, for a graph returns its gradients together, so compile
    block by block (`block.compile()`). `parameter.grad` is therefore None after `backward`:
    `torch.nn.utils.clip_grad_norm_` would silently do nothing. Give `max_norm` instead, which clips by the global norm
    of the selected gradient, as clipping masked gradients would. Several backward passes before a step add up, and the
    step uses them up. State is float32 or wider; of weights of lower precision a float32 copy of the chosen is kept,
    which gives way wherever the weights were changed from outside.
    One optimizer trains a parameter: a newer one closes the older.
    `torch.amp.GradScaler` is refused, for its unscaling needs `parameter.grad`; bfloat16 needs no scaler.

    `selected`: what `apply_selection` returns, or groups `{"params": [...], "weight_decay": 0.0}` of it.
    Raises ConfigurationError for anything else, for options that AdamW cannot have, and for a group's `max_norm`,
    `process_group` and options of torch's AdamW that are not here; other members of a group are yours, and left alone.

    Several processes: with replicas of the model give `process_group` (`torch.distributed.group.WORLD`); the selected
    gradients, and nothing else, are averaged over it in `step`; replicas whose trained tensors do not start equal, or
    that train different selections, are refused. Leave `DistributedDataParallel` away: it would keep, and send, whole
    gradients; `step` refuses it, unless it was made with `find_unused_parameters`, which hides it. Shards
    (FSDP2) are averaged by `fully_shard` itself and need no group. `process_group="alone"` says that this process
    trains a model of its own.
    """

    def __init__(
        self,
        selected: Iterable[SelectedParameter] | Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        process_group: ProcessGroup | Literal["alone"] | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigurationError(f"max_norm = {max_norm} has to be positive; None does not clip")
        if not (process_group is None or process_group == "alone" or isinstance(process_group, ProcessGroup)):
            raise ConfigurationError(
                f"process_group = {process_group!r} is no process group: give torch.distributed.group.WORLD, of a "
                "DeviceMesh mesh.get_group(), or 'alone' if each process trains a model of its own"
            )
        self.selected: list[SelectedParameter] = []
        self.max_norm = max_norm
        self.process_group = process_group
        self.last_norm: float | None = None
        """Norm of the selected gradient at the last step, before clipping; measured only with `max_norm`."""
        self.gradient_bytes = 0
        """Bytes of the selected gradients at the last step."""
        self.largest_gradient_bytes = 0
        """Largest full gradient of one tensor seen; those that exist at one time are told above."""
        self._reached = False
        """Whether a gradient was ever taken, in any process; loaded state proves nothing of that."""
        self._compared = False
        """Whether the replicas were found equal."""
        self._by_parameter: dict[nn.Parameter, SelectedParameter] = {}
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks: list[Any] = []
        given = list(selected)
        if any(isinstance(each, Mapping) for each in given):
            if not all(isinstance(each, Mapping) for each in given):
                raise ConfigurationError('beside a group a selected parameter has to be in one: {"params": [...]}')
            groups = [{**group, "params": list(group["params"])} for group in cast(list[Mapping[str, Any]], given)]
        else:
            groups = [{"params": given}]
        if not any(group["params"] for group in groups):
            raise ConfigurationError("SelectedAdamW was given nothing to train")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._check_groups(groups, defaults)  # all, before the first closes an older optimizer
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more selected parameters, with options of their own."""
        entries: list[SelectedParameter] = list(param_group["params"])
        self._check_groups([param_group | {"params": entries}], self.defaults)
        super().add_param_group(param_group | {"params": [entry.parameter for entry in entries]})
        for entry in entries:
            self.selected.append(entry)
            self._by_parameter[entry.parameter] = entry
            for older in readers_of(entry.parameter):
                if isinstance(older, SelectedAdamW):
                    older.close()
            hook = entry.parameter.register_post_accumulate_grad_hook(GradientHook(self._take_gradient))  # type: ignore[no-untyped-call]  # torch has no types for it
            self._hooks.append(hook)

    def _check_groups(self, groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
        """ConfigurationError for what cannot be trained, before anything is changed."""
        known = set(self._by_parameter)
        for group in groups:
            refused = sorted(group.keys() & _NOT_OF_A_GROUP)
            if refused:
                raise ConfigurationError(f"a group has no option {refused[0]}, but {', '.join(defaults)}")
            _check_options({**defaults, **group})
            for entry in group["params"]:
                if not isinstance(entry, SelectedParameter):
                    raise ConfigurationError("SelectedAdamW takes what apply_selection(model, selection) returns")
                if entry.parameter in known:
                    raise ConfigurationError(f"{entry.name} is given twice")
                if self.process_group is not None and entry.shard_group is not None:
                    raise ConfigurationError(
                        f"{entry.name} is sharded, and so averaged already: leave process_group away"
                    )
                known.add(entry.parameter)

    def close(self) -> None:
        """Remove the hooks and drop the gradients; the model trains as any other again, and `step` refuses."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gradients.clear()

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self._reached = True
        if gradient.layout != torch.strided:
            raise ConfigurationError(
                f"{self._by_parameter[parameter].name} has a sparse gradient: make its embedding with sparse=False"
            )
        self.largest_gradient_bytes = max(self.largest_gradient_bytes, local(gradient).nbytes)
        chosen = self._by_parameter[parameter].entries(gradient).to(_state_dtype(parameter))
        kept = self._gradients.get(parameter)
        self._gradients[parameter] = chosen if kept is None else kept.add_(chosen)
        parameter.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW step (Loshchilov and Hutter 2019, Algorithm 2) on what the backward passes left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = self._check_gradients()
        if isinstance(self.process_group, ProcessGroup):
            self._average(self.process_group, used)
        clip = self._clip_factor()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self._gradients.get(parameter)
                if gradient is not None:
                    self._update(self._by_parameter[parameter], gradient, clip, group)
        self.gradient_bytes = sum(gradient.nbytes for gradient in self._gradients.values())
        self._gradients.clear()  # transformers.Trainer calls model.zero_grad(), which cannot reach them
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked for by torch.amp.GradScaler before a step, and by Lightning's mixed precision before it unscales or
        clips: neither would find a gradient."""
        raise ConfigurationError(
            "a GradScaler, or clipping under mixed precision, finds no gradients on the parameters of SelectedAdamW: "
            "train in bfloat16, which needs no scaler (precision='bf16-mixed' in Lightning), and clip by max_norm"
        )

    def _check_gradients(self) -> list[bool]:
        """Which tensors have a gradient, in any of the processes.

        Refuses, in all processes, what would train silently on wrong gradients or on none in one of them: if it alone
        refused, the others would wait for it.
        """
        refusal = self._refusal()
        used = [entry.parameter in self._gradients for entry in self.selected]
        if isinstance(self.process_group, ProcessGroup):
            group, device = self.process_group, self.selected[0].parameter.device
            if not self._compared:
                self._compare_selections(group, device)
                self._compare_replicas(group, device)
            flags = torch.tensor([*used, self._reached, refusal is not None], device=device).int()
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group)
            *used, self._reached, refused = flags.bool().tolist()
            if refused and refusal is None:
                refusal = "another process refuses this step; its error says why"
        if refusal is None and not self._reached:
            refusal = "no gradient has reached the optimizer: was the model wrapped or replaced after apply_selection?"
        if refusal is not None:
            raise ConfigurationError(refusal)
        return used

    def _refusal(self) -> str | None:
        """What is wrong in this process."""
        if not self._hooks:
            return "this optimizer is closed: close() was called, or a newer one trains the model"
        replaced = [
            entry.name for entry in self.selected if entry.parameter not in self._gradients and entry.is_replaced
        ]
        if replaced:
            return (
                f"the model has other tensors now than the optimizer trains: {some(replaced)}. After what replaces "
                "tensors, such as load_state_dict(..., assign=True) or to_empty, call apply_selection and make a new "
                "optimizer"
            )
        if any(entry.parameter.grad is not None for entry in self.selected):
            return (
                "whole gradients were put on the parameters after their hooks: a wrapper such as "
                "DistributedDataParallel keeps them. Train the model without it and give process_group. Where "
                "get_optimizer_state_dict put them there, save optimizer.state_dict() instead."
            )
        if not self._gradients and not any(entry.parameter.requires_grad for entry in self.selected):
            return (
                "all that this optimizer trains was frozen after apply_selection, as by peft, which adds an adapter: "
                "train either the selection or the adapter"
            )
        if self.process_group is None and any(entry.shard_group is None for entry in self.selected):
            several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
            if several:
                return (
                    "several processes train and nobody averages their gradients: give process_group="
                    "torch.distributed.group.WORLD, or 'alone' if each trains a model of its own"
                )
        return None

    def _average(self, group: ProcessGroup, used: Sequence[bool]) -> None:
        """Mean over the processes; a tensor that some of them did not use counts as zero there.

        Each gradient is sent from its own device, so a tensor's device has to be the same kind in every process.
        """
        sending = []
        for entry, is_used in zip(self.selected, used, strict=True):
            if is_used:
                if entry.parameter not in self._gradients:
                    zeros = torch.zeros_like(
                        entry.entries(entry.parameter.detach()), dtype=_state_dtype(entry.parameter)
                    )
                    self._gradients[entry.parameter] = zeros
                gradient = self._gradients[entry.parameter]
                sending.append((gradient, distributed.all_reduce(gradient, group=group, async_op=True)))
        for gradient, work in sending:
            work.wait()
            gradient.div_(group.size())

    def _compare_selections(self, group: ProcessGroup, device: torch.device) -> None:
        """ConfigurationError, in every process, where they train different coordinates, which would be mixed up."""
        digest = hashlib.sha256(json.dumps(list(self._digests().items())).encode()).digest()
        lowest = torch.tensor(list(digest), dtype=torch.int32, device=device)
        highest = lowest.clone()
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN, group)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX, group)
        if not torch.equal(lowest, highest):
            raise ConfigurationError(
                "the processes selected different coordinates, as from samples or free memory of their own: select in "
                "one of them, and give the others what it saved (selection.save, Selection.load)"
            )

    def _compare_replicas(self, group: ProcessGroup, device: torch.device) -> None:
        """ConfigurationError, in every process, where their weights differ; sums of the bits find it."""
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = torch.stack(
            [
                entry.parameter.detach().reshape(-1).view(integers[entry.parameter.element_size()]).sum().to(device)
                for entry in self.selected
            ]
        )
        lowest, highest = sums.clone(), sums
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN, group)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX, group)
        differing = (lowest != highest).nonzero().flatten().tolist()
        if differing:
            names = some([self.selected[place].name for place in differing])
            raise ConfigurationError(
                f"the processes hold different weights of {names}: start them from one checkpoint or one seed, or send "
                "those of the first with torch.distributed.broadcast(parameter.detach(), 0)"
            )
        self._compared = True

    def _clip_factor(self) -> float:
        if self.max_norm is None:
            return 1.0
        self.last_norm = self._global_norm()
        if self.max_norm == math.inf:
            return 1.0
        factor = self.max_norm / (self.last_norm + 1e-6)  # 1e-6 as torch.nn.utils.clip_grad_norm_ has it
        return min(factor, 1.0)  # min() would make 1 of NaN, and take an unclipped step

    def _global_norm(self) -> float:
        """Of all selected gradients, those of other processes' shards included."""
        norms: dict[ProcessGroup | None, list[torch.Tensor]] = {entry.shard_group: [] for entry in self.selected}
        for entry in self.selected:
            if entry.parameter in self._gradients:
                norms[entry.shard_group].append(self._gradients[entry.parameter].norm())
        device, total = self.selected[0].parameter.device, 0.0
        for group, found in norms.items():
            norm = torch.stack([norm.to(device) for norm in found]).norm() if found else torch.zeros((), device=device)
            if group is None:
                total = math.hypot(total, float(norm))
                continue
            square = norm.float().square()
            distributed.all_reduce(square, group=group)
            total = math.hypot(total, math.sqrt(float(square)))
        return total

    def _update(self, entry: SelectedParameter, gradient: torch.Tensor, clip: float, group: dict[str, Any]) -> None:
        state = self.state[entry.parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        if clip != 1.0:
            gradient = gradient.mul_(clip)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(correction2)).add_(group["eps"])
        value = _values(entry, state, gradient.dtype)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)
        entry.write(value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients taken since the last step; `model.zero_grad()` cannot."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

    def training_bytes(self) -> int:
        """Bytes that a step holds: moments, float32 copies, indices, and the selected gradients."""
        return self.optimizer_bytes() + self.gradient_bytes

    def optimizer_bytes(self) -> int:
        """Bytes of state now held: moments, float32 copies, and indices."""
        indices = sum(entry.indices.nbytes for entry in self.selected if entry.indices is not None)
        return optimizer_bytes(self) + indices

    def __getstate__(self) -> NoReturn:
        """Asked for by copy.deepcopy and pickle: a copy would have the state, and no hooks on a model's tensors."""
        raise ConfigurationError(
            "a SelectedAdamW cannot be copied or pickled, for it belongs to the tensors of its model: make another one "
            "by apply_selection, and give it what state_dict() returned"
        )

    def state_dict(self) -> dict[str, Any]:
        """State by tensor name, with a digest of what is selected of it; the selection is saved on its own.

        Of a sharded model each process has its own part, which it saves in a file of its own;
        `torch.distributed.checkpoint.state_dict` cannot gather them.
        """
        return {
            "selection": self._digests(),
            "shards": self._shards(),
            "state": {
                entry.name: dict(self.state[entry.parameter])
                for entry in self.selected
                if self.state.get(entry.parameter)
            },
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an optimizer over the same selection; ConfigurationError for another's.

        A sharded model continues in as many processes as saved it, each with what it saved; else ConfigurationError.
        """
        entries = {entry.name: entry for entry in self.selected}
        if "selection" not in state_dict:
            raise ConfigurationError(
                "the state does not say to which selection it belongs: it is another optimizer's, or of a version "
                "of this package that did not note it"
            )
        theirs, ours = state_dict["selection"], self._digests()
        shards, held = state_dict.get("shards", {}), self._shards()
        for name in sorted(theirs.keys() & ours.keys()):
            if shards.get(name) != held.get(name):
                raise ConfigurationError(
                    f"the state is of {shards.get(name, 'the whole')} of {name}, and this process holds "
                    f"{held.get(name, 'the whole')}: continue in as many processes as saved it, each from its own file"
                )
        other = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        for name in other:
            if theirs.get(name, "").startswith(_ALL) and ours.get(name, "").startswith(_ALL):
                raise ConfigurationError(
                    f"the state is of a tensor of another shape: {name} was trained, {theirs[name]}, and "
                    f"here it is {ours[name]}"
                )
        if other:
            raise ConfigurationError(f"the state belongs to another selection: {other[0]} differs, {len(other)} in all")
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ConfigurationError("the state has another number of parameter groups")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self.state.clear()
        for name, saved in state_dict["state"].items():
            device = entries[name].parameter.device
            self.state[entries[name].parameter] = {
                key: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                for key, value in saved.items()
            }

    def _shards(self) -> dict[str, str]:
        """Which part of a sharded tensor this process holds, by tensor name."""
        return {
            entry.name: f"shard {entry.shard_group.rank() + 1} of {entry.shard_group.size()}"
            for entry in self.selected
            if entry.shard_group is not None
        }

    def _digests(self) -> dict[str, str]:
        """SHA-256, by tensor name, of which parts are selected and how wide they are; the shape where all is."""
        return {
            entry.name: f"{_ALL} {tuple(entry.parameter.shape)}"
            if entry.indices is None
            else hashlib.sha256(f"{entry.width} ".encode() + entry.indices.cpu().long().numpy().tobytes()).hexdigest()
            for entry in self.selected
        }


def _check_options(options: Mapping[str, Any]) -> None:
    """ConfigurationError for numbers with which AdamW would not descend."""
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ConfigurationError(f"{name} = {options[name]} must not be negative")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ConfigurationError(f"betas = {options['betas']} have to lie in [0, 1)")


def _values(entry: SelectedParameter, state: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """The chosen weights in the state's precision: the copy that outlasts rounding, or the weights themselves.

    What the copy does not round to was changed from outside (a checkpoint loaded, a delta put on): the weight counts.
    """
    weights = entry.entries(entry.parameter.detach())
    if weights.dtype == dtype:
        state.pop("value", None)
        return weights
    wide = weights.to(dtype)
    if "value" not in state:
        state["value"] = wide
    else:
        value = state["value"]
        torch.where(value.to(weights.dtype) == weights, value, wide, out=value)
    return cast(torch.Tensor, state["value"])


def _state_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in any optimizer's state, as they are held now, even while another thread fills it."""
    return sum(
        value.nbytes
        for state in list(optimizer.state.values())
        for value in list(state.values())
        if isinstance(value, torch.Tensor)
    )
