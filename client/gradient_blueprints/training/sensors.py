"""Energy counters: processors and memory through RAPL, NVIDIA devices through NVML. What cannot be read has no counter.

A counter adds up joules of the whole package, memory or device, whoever used it. It is read by differences, often
enough that a register which wraps around (RAPL: after minutes of full load) wraps at most once between two readings.
"""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import pynvml
import torch

from gradient_blueprints.run_models import Instrument

POWERCAP = Path("/sys/class/powercap")
Part = Literal["accelerator", "processor", "memory"]


class EnergyCounter(Protocol):
    """A sensor of energy; `joules` gives what was drawn since the last call, 0 at the first."""

    sensor: str
    part: Part
    instrument: Instrument

    def joules(self, seconds: float) -> float:
        """Joules since the last call, which was `seconds` ago. Raises OSError where it cannot be read any more."""
        ...


class RaplDomain:
    """A package of processors, or its memory, of Linux' powercap interface (Intel, and AMD since Zen)."""

    instrument = Instrument.RAPL

    def __init__(self, folder: Path, host: str) -> None:
        """Raises OSError where the counter may not be read: by default only root may (CVE-2020-8694)."""
        name = (folder / "name").read_text().strip()
        self.part: Part = "memory" if name == "dram" else "processor"
        self.sensor = f"{host}/{folder.name}/{name}"
        self._counter = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._microjoules()

    def _microjoules(self) -> int:
        return int(self._counter.read_text())

    def joules(self, seconds: float) -> float:
        now = self._microjoules()
        drawn, self._last = (now - self._last) % (self._range + 1), now
        return drawn / 1e6


def rapl_domains(root: Path = POWERCAP, host: str | None = None) -> list[RaplDomain]:
    """Packages and their memory, as far as they may be read. Cores and graphics are part of a package; left out."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                found.append(RaplDomain(folder, host or host_id()))
        except OSError:
            continue
    return found


class NvidiaDevice:
    """One NVIDIA device: its energy counter, or before Volta its power, sampled and summed over time."""

    part: Part = "accelerator"

    def __init__(self, nvml: Any, handle: Any, sensor: str) -> None:
        """Raises nvml.NVMLError where neither can be read, as for a slice of a device (MIG)."""
        self.sensor = sensor
        self._nvml, self._handle = nvml, handle
        try:
            self._last = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self.instrument = Instrument.NVML_COUNTER
        except nvml.NVMLError:
            self._last = nvml.nvmlDeviceGetPowerUsage(handle)
            self.instrument = Instrument.NVML_POWER

    def joules(self, seconds: float) -> float:
        counts = self.instrument is Instrument.NVML_COUNTER
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption if counts else self._nvml.nvmlDeviceGetPowerUsage
        try:
            now, before = read(self._handle), self._last
        except self._nvml.NVMLError as error:
            raise OSError(f"{self.sensor} cannot be read any more: {error}") from error
        self._last = now
        if counts:
            return float(max(0, now - before) / 1e3)  # millijoules; the count starts anew with the driver
        return float((now + before) / 2e3 * seconds)  # milliwatts, by trapezoids


def nvidia_devices(devices: Iterable[torch.device], nvml: Any = pynvml) -> list[NvidiaDevice]:
    """Counters of those of the CUDA devices that NVML reads.

    A device is found by its UUID: NVML counts all devices of the machine, CUDA those that CUDA_VISIBLE_DEVICES
    leaves, in an order of its own.
    """
    wanted = [device for device in devices if device.type == "cuda"]
    if not wanted:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver: AMD's devices are called cuda too
        return []
    found = []
    for device in wanted:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{_cuda_uuid(device)}")
            found.append(NvidiaDevice(nvml, handle, device_id(device)))
        except nvml.NVMLError:
            continue
    return found


def _cuda_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def device_id(device: torch.device) -> str:
    """An id of a device that is the same in every process that uses it; its serial cannot be read off it."""
    if device.type == "cuda":
        return f"cuda-{_digest(_cuda_uuid(device))}"
    return f"{host_id()}/{device}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device.type)


def host_id() -> str:
    """An id of the machine until it boots again, the same in all its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"host-{_digest(boot.read_text() if boot.is_file() else str(uuid.getnode()))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def processor_name() -> str:
    """Such as `AMD EPYC 7763 (64 cores)`; logical ones that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()} ({usable_cores()} cores)"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cores_of_machine() -> int:
    """Those that this process may not use among them."""
    return os.cpu_count() or 1


def processor_seconds() -> float:
    """Processor time of this process, and of its children that have ended (a data loader's workers at its end)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where /proc does not say."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def allocated_bytes(devices: Iterable[torch.device]) -> int:
    """Bytes that torch's allocators have handed out on these accelerators."""
    return sum(_allocated(device) for device in devices)


def _allocated(device: torch.device) -> int:
    module = getattr(torch, device.type)
    if device.type == "mps":
        return int(module.current_allocated_memory())
    return int(module.memory_allocated(device)) if module.is_initialized() else 0


def accelerators_of(tensors: Iterator[torch.Tensor]) -> list[torch.device]:
    """The accelerators that hold any of these tensors."""
    return sorted({tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}, key=str)
