"""What was run on what, as digests: of the weights, and of the batches in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradient_blueprints.training.profiling.losses import Batch

_BLOCK = 1 << 24  # bytes hashed at once


def weights_digest(model: nn.Module) -> str | None:
    """`sha256:…` over name, dtype, shape and bytes of every parameter and stored buffer, by name; tied ones once.

    None where weights are not all in memory here: on the meta device (offloaded), or sharded over processes.
    """
    parameters = dict(model.named_parameters())
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in known}
    tensors = sorted({**buffers, **parameters}.items())
    if any(not isinstance(value, Tensor) or value.is_meta or hasattr(value, "full_tensor") for _, value in tensors):
        return None
    found = hashlib.sha256()
    for name, value in tensors:
        _add(found, name, value)
    return f"sha256:{found.hexdigest()}"


def batch_digest(batch: Batch) -> str:
    """SHA-256 of the batch's tensors by name, hexadecimal."""
    found = hashlib.sha256()
    for name in sorted(batch):
        if isinstance(batch[name], Tensor):
            _add(found, name, batch[name])
    return found.hexdigest()


def data_digest(batches: Iterable[str]) -> str:
    """`sha256:…` of the batches' digests, whatever their order, so that shards give that of one run."""
    return f"sha256:{hashlib.sha256(' '.join(sorted(batches)).encode()).hexdigest()}"


def _add(found: hashlib._Hash, name: str, tensor: Tensor) -> None:
    found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for block in torch.split(raw, _BLOCK):
        found.update(block.cpu().numpy().data)
