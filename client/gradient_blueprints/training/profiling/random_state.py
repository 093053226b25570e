"""The random generators of a batch: seeded by what it is, put back afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradient_blueprints.training.profiling.state import Key


class RandomState:
    """The generators' states, to be put back."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._devices:
            torch.cuda.set_rng_state_all(self._devices)


@contextmanager
def seeded(seed: int, domain: str, key: Key) -> Iterator[None]:
    """Dropout of a batch depends on the seed and the batch, not on what was run before it."""
    before = RandomState()
    digest = hashlib.sha256(json.dumps([seed, domain, key]).encode()).digest()
    try:
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield
    finally:
        before.restore()
