"""Who may load torch. What the thin client loads is guarded in tests/sdk/test_package.py."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.split())


@pytest.mark.parametrize("module", ["app.api.application", "app.relay", "app.embedded.supervisor"])
def test_the_service_never_loads_torch(module: str) -> None:
    assert loaded_by(f"import {module}") & {"torch", "transformers"} == set()


def test_the_worker_loads_torch_only_in_its_subprocess() -> None:
    """So that ending the subprocess frees the device and all memory."""
    assert loaded_by("import worker.tasks, worker.attempts") & {"torch", "transformers"} == set()
