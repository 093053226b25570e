"""The budget that fits a device: its free memory less what a training step holds besides the selection."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from gradient_blueprints import allocation
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.losses import LossReader, evaluating, on_device_of
from gradient_blueprints.training.profiling.offload import lender_of
from gradient_blueprints.training.profiling.train_mode import buffers_kept
from gradient_blueprints.training.selection.listed_tensors import kept_fixed, tied_names

RESERVE = 0.1
"""Share of the free memory that is left alone: the allocator's fragments, workspaces of kernels."""

TIED_GRADIENTS = 3
"""Whole gradients of a tensor with two uses that exist at once: of the uses, and their sum."""


class Budget(allocation.Budget):
    """How much may be trained: a fraction, parameters, bytes of training memory, or what fits a device."""

    @classmethod
    def device(
        cls,
        model: nn.Module,
        batch: Mapping[str, Any] | tuple[int, int],
        *,
        free: float | None = None,
        reserve: float = RESERVE,
    ) -> Self:
        """What is left for training on the model's device when one batch is in flight.

        free · (1 − reserve) − activations − the largest gradient, or − three gradients of a tied tensor where these
        are more: autograd adds what one use gave to what the other did, when the activations are gone. The activations
        are measured: the tensors that one forward pass of `batch`, or of zeros of the shape (sequences, tokens), saves
        for its backward pass in training mode, and the largest of them (the logits) once more for its own gradient.
        What checkpointed segments compute anew is not counted. A model whose labels are not its input ids, such as a
        classifier, takes a batch that has them. The model stays as it is. `free`: bytes, else what the
        device says now, with the model on it (CUDA; on Linux the available main memory). Raises ConfigurationError
        when nothing is left, when the free memory is not known, or for a model on the meta device.
        """
        if isinstance(batch, tuple):
            batch = {"input_ids": torch.zeros(batch, dtype=torch.long)}
        available = free_bytes(next(model.parameters()).device) if free is None else free
        saved = saved_bytes(model, batch)
        gradient, tied = _gradient_bytes(model)
        held = max(sum(saved) + max(saved, default=0) + gradient, TIED_GRADIENTS * tied)
        left = available * (1 - reserve) - held
        if left <= 0:
            raise ConfigurationError(
                f"{available / 1e6:,.0f} MB are free, the activations take {sum(saved) / 1e6:,.0f} MB, the largest "
                f"gradient {gradient / 1e6:,.0f} MB, those of a tied tensor {TIED_GRADIENTS * tied / 1e6:,.0f} MB: "
                "nothing is left to train with. Use smaller batches or gradient checkpointing, or freeze the embedding."
            )
        return cls.bytes(left)


def _gradient_bytes(model: nn.Module) -> tuple[int, int]:
    """The largest gradient of a tensor that may be trained, and of a tied one."""
    fixed = kept_fixed(model)
    sizes = [(parameter.nbytes, len(names) > 1) for names, parameter in tied_names(model) if names[0] not in fixed]
    return max((size for size, _ in sizes), default=0), max((size for size, tied in sizes if tied), default=0)


def saved_bytes(model: nn.Module, batch: Mapping[str, Any]) -> list[int]:
    """Bytes of every storage that a forward pass in training saves for its backward pass, the weights left out."""
    for module in model.modules():
        if lender_of(module) is None and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise ConfigurationError(
                "what a model on the meta device saves cannot be measured, its storages all have the address 0: load "
                "its weights, or ask `estimate_memory`, which needs none, and give `Budget.bytes`"
            )
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    reader = LossReader(model)
    with as_in_training(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = reader.output_of(on_device_of(model, reader.with_labels(batch, run=False)))
        del output
    return list(held.values())


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients for a while; modes, contents of buffers and random state are the same afterwards.

    Dropout keeps its masks in this mode alone, and Hugging Face's models checkpoint in no other.
    """
    with torch.random.fork_rng(), torch.enable_grad(), evaluating(model):
        model.train()
        with buffers_kept(model):
            yield


def free_bytes(device: torch.device) -> float:
    """Free memory of a CUDA device, or available main memory where the system says it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    raise ConfigurationError(f"how much memory is free on {device} is not known here: pass free=")
