"""What train mode does beside dropout: buffers that a pass changes, and layers that mix the examples of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradient_blueprints.errors import ConfigurationError


def refuse_batch_statistics(model: nn.Module) -> None:
    """ConfigurationError for batch norm in train mode: no example has a gradient of its own there."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigurationError(
                f"{path or type(module).__name__} normalizes by its batch, in which no example has a gradient of its "
                "own: call model.eval() before profiling, or put its batch norms alone in eval mode."
            )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers of modules in train mode are as before afterwards, such as the vectors of a spectral norm."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                if not torch.equal(buffer, values):  # torch's norms write their statistics past the buffer's version
                    buffer.copy_(values)
                module._buffers[name] = buffer
