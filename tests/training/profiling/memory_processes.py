"""What a process of its own finds out about memory, for test_memory; imports little, so that it starts soon."""

import re
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.passes import OutOfMemory


def squared(outputs: Tensor, values: Any) -> Tensor:
    return outputs.square().sum((1, 2))


def memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class Deep(nn.Module):
    """12 layers of 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12)))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs)
        return output


def peaks() -> dict[str, int]:
    """Peak memory of a batch over what was held before it, by statistics."""
    model = Deep()
    found = {}
    for statistics in ("examples", "batches", "all"):
        with GradientProfiler(model, loss=squared, statistics=statistics, verify=False) as profiler:
            profiler.step({"inputs": torch.randn(2, 4, 1024)}, key="warm-up")
            Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
            before = memory("VmRSS")
            profiler.step({"inputs": torch.randn(2, 64, 1024)})
            found[statistics] = memory("VmHWM") - before
    return found


class Wide(nn.Module):
    """Its hidden layer of 16 MB an example is larger than anything else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 8192), nn.Linear(8192, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(inputs)))
        return output


def halved() -> dict[str, Any]:
    """A run without and one with a limit on memory, and a batch of which no example fits."""
    values = {"inputs": torch.randn(8, 512, 16)}
    model = Wide()
    states = []
    for limited in (False, True):
        with GradientProfiler(model, loss=squared) as profiler:
            profiler.step({"inputs": torch.randn(8, 2, 16)}, key="small")
            limits = resource.getrlimit(resource.RLIMIT_AS)
            if limited:
                resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (300 << 20), limits[1]))
            profiler.step(values, key="large")
            profiler.step({"inputs": torch.randn(8, 2, 16)}, key="after")
            if limited:
                resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (20 << 20), limits[1]))
                try:
                    profiler.step(values, key="impossible")
                except OutOfMemory as error:
                    message = str(error)
            resource.setrlimit(resource.RLIMIT_AS, limits)
        states.append(profiler)
    free, limited_one = (state.domain() for state in states)
    extra: Any = states[1].blueprint("m", 1.0).extra
    return {
        "halved": [free.halved, limited_one.halved],
        "extra": extra["profile"]["halved_micro_batches"],
        "norms": [domain.records["large"].norms for domain in (free, limited_one)],
        "squares": [domain.records["large"].example_squares for domain in (free, limited_one)],
        "keys": [*limited_one.records],
        "message": message,
    }


def send(connection: Any) -> None:
    torch.set_num_threads(1)
    connection.send((peaks(), halved()))
