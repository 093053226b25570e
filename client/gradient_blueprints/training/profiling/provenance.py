"""What was run on what: the provenance of a profile, of which a repetition gives the same bytes."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch
from torch import nn

from gradient_blueprints.models import Provenance
from gradient_blueprints.training.profiling.digests import data_digest
from gradient_blueprints.training.profiling.state import DomainState, ProfileState


def environment(model: nn.Module, seed: int, weights_digest: str | None) -> Provenance:
    """What holds whatever the data: weights, versions, device."""
    parameter = next(model.parameters())
    return Provenance(
        profiler=f"gradient-blueprints {metadata.version('gradient-blueprints')}",
        weights_digest=weights_digest,
        seed=seed,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=_device_of(model),
        versions={"python": platform.python_version(), "torch": torch.__version__, **_version("transformers")},
    )


def measured(model: nn.Module, state: ProfileState, seed: int, weights_digest: str | None) -> Provenance:
    """The environment, and what was read: the same for one run and for shards merged in any order."""
    domains = {name: domain for name, domain in sorted(state.domains.items()) if domain.records}
    records = [record for domain in domains.values() for record in domain.records.values()]
    return environment(model, seed, weights_digest).model_copy(
        update={
            "batches": len(records),
            "batch_size": max((len(record.losses) for record in records), default=None),
            "examples": sum(domain.examples for domain in domains.values()),
            "tokens": sum(domain.tokens for domain in domains.values()),
            "sequence_length": max((record.length for record in records if record.length), default=None),
            "loss": {name: float(f"{domain.loss:.6g}") for name, domain in domains.items()},
            "data": {name: _data(domain) for name, domain in domains.items()},
        }
    )


def _data(domain: DomainState) -> dict[str, Any]:
    facts: dict[str, Any] = {"batches": len(domain.records), "examples": domain.examples, "tokens": domain.tokens}
    digests = [record.digest for record in domain.records.values()]
    known = [digest for digest in digests if digest is not None]
    return facts | ({"digest": data_digest(known)} if len(known) == len(digests) else {})


def resources_used(seconds: float) -> dict[str, float]:
    """Seconds and peak memory of this process, which no two runs have alike."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
    if torch.cuda.is_available():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _device_of(model: nn.Module) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    return ", ".join(sorted(_device_name(device) for device in devices))


def _device_name(device: torch.device) -> str:
    if device.type == "meta":
        return "weights offloaded"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}
