"""Whether the device that the settings name can be used, as a process of its own finds: the worker loads no torch."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
try:
    torch.ones(1, device=sys.argv[1]).item()
except Exception as error:
    sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0]}")
"""


def device_fault(device: str) -> str | None:
    """What keeps a named device from use, for a person; `auto` takes what there is, and a CPU is there always."""
    if device in {"auto", "cpu"}:
        return None
    looked = subprocess.run([sys.executable, "-c", PROGRAM, device], capture_output=True, text=True, check=False)
    if looked.returncode == 0:
        return None
    why = looked.stderr.strip().splitlines() or [f"the process that tried ended with status {looked.returncode}"]
    return f"the device {device!r} cannot be used: {why[-1]}"
