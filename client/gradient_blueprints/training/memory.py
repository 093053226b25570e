"""Memory of a training step before it is taken: the step is run on tensors that have shapes and no contents."""

from __future__ import annotations

import copy
import itertools
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.selection import Selection

GB = 1e9
_EXPERTS = 'model.set_experts_implementation("batched_mm"), which holds more'
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors in a training step.

    `peak` is the most that is held at one moment. It is less than the sum of the parts where activations are freed
    while gradients come, and more where the optimizer makes temporary copies.
    """

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Held between the backward pass and the step."""
    optimizer_state: int
    """Moments, and float32 copies of selected weights of lower precision."""
    indices: int
    """Which coordinates are selected."""
    activations: int
    """What the forward pass keeps for the backward pass, outputs too."""
    peak: int

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer_state", "indices", "activations", "peak")
        return ", ".join(f"{name.replace('_', ' ')} {getattr(self, name) / GB:.3f} GB" for name in parts)


def estimate_memory(
    model: nn.Module,
    selection: Selection | None = None,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    *,
    batch: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> MemoryEstimate:
    """What one training step of `model` on `batch` will hold, without allocating any of it.

    The model may live on the meta device, so that one too large for this machine can be asked about; it is not
    changed. Two steps are taken on fake tensors, the second with the optimizer's state in place, and the bytes of live
    tensors are counted. So whatever the model does is in the figure: tied weights, gradient checkpointing, the
    logits. Not in it: what the allocator rounds and fragments, the libraries' workspaces, and the runtime itself (some
    hundreds of MB of CUDA context). Within 10 % of measured peaks (tests/training/test_memory.py).

    Args:
        selection: what is trained, with `SelectedAdamW`. Without one, the parameters that require a gradient are,
            with `optimizer`, a function from parameters to an optimizer.
        batch: keyword arguments of the model, for their shapes.
        dtype: of the weights, instead of the one they have.
        device: whose kernels are asked what they keep; one that this build of torch can use.
        autocast: compute in this dtype under torch.autocast.

    Raises ConfigurationError when the model's control flow depends on the contents of tensors, for a mixture of experts
    in float32 unless its experts are "batched_mm", and when there is no loss.
    """
    device = torch.device(device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        raise ConfigurationError(f"this build of torch cannot use {device}, so it does not know what {device} keeps")
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        shadow = _shadow(model, dtype, device)
        inputs = {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in batch.items()}
        live.forget()
        live.hold([*shadow.parameters(), *shadow.buffers()])
        weights = live.now
        stepper = (
            optimizer([parameter for parameter in shadow.parameters() if parameter.requires_grad])
            if selection is None
            else SelectedAdamW(apply_selection(shadow, selection), process_group="alone")
        )
        indices = live.now - weights
        for _ in range(2):  # the second step has the optimizer's state beside it from the start
            held = live.peak = live.now
            try:
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    loss = shadow(**inputs).loss
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ConfigurationError(
                    f"what the model computes depends on what is in its tensors: {error}. A mixture of experts: "
                    f"{_EXPERTS}"
                ) from None
            except RuntimeError as error:
                if "grouped_mm" not in "".join(traceback.format_exception(error)):
                    raise
                raise ConfigurationError(
                    f"torch tells the shapes of grouped products in bfloat16 alone ({error}): dtype=torch.bfloat16, or "
                    f"{_EXPERTS}"
                ) from None
            if loss is None:
                raise ConfigurationError("the model gives no loss: put labels into the batch")
            activations = live.now - held
            loss.backward()
            del loss
            gradients = live.now - held
            stepper.step()
            stepper.zero_grad()
        state = live.now - weights - indices
    return MemoryEstimate(weights, gradients, state, indices, activations, live.peak)


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Run `work` and read off the allocator how far above the start its memory went, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ConfigurationError(f"no way to read the peak of {device}'s allocator; there is one on cuda and cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(0, *itertools.accumulate(size for _, size in events)) if events else 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts the bytes of the tensors that operators made while it is on, and that still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._age = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these too, each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            size = storage.nbytes()
            self._seen[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, size, self._age)

    def _release(self, size: int, age: int) -> None:
        if age == self._age:
            self.now -= size

    def forget(self) -> None:
        """Begin anew; what lives counts only once it is held again."""
        self._seen = WeakIdKeyDictionary()
        self._age += 1
        self.now = self.peak = 0


def _shadow(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model with tensors of its shapes instead of its own, in training mode; nothing of it is copied."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device=device)

    replaced: dict[int, Any] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        replaced[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, replaced).train()
