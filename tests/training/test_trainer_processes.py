"""Two processes of a real Trainer, started by torchrun, train a selection as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.replicated_training import STEPS, train

Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return train(tmp_path_factory.mktemp("alone"), rank=0, processes=1)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("both")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launch, "-m", "tests.training.replicated_training", str(folder)]
    done = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in (0, 1)
    ]


def test_replicas_train_what_one_process_trains(alone: Found, both: list[Found]) -> None:
    expected, logged = alone
    for weights, found in both:
        assert found["norms"] == pytest.approx(logged["norms"], rel=1e-4)  # Adam hides a wrong scale, the norm does not
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert both[0][1]["losses"] == pytest.approx(logged["losses"], rel=1e-4)
    assert len(logged["norms"]) == STEPS
    for name, value in both[0][0].items():
        assert torch.equal(value, both[1][0][name])


def test_replicas_resume_where_they_were_saved(both: list[Found]) -> None:
    for weights, _ in both:
        for name in [name for name in weights if name.startswith("straight/")]:
            assert torch.equal(weights[name], weights[name.replace("straight/", "resumed/")])


def test_replicas_are_not_wrapped_and_other_kinds_of_trainers_keep_their_ways(both: list[Found]) -> None:
    for _, found in both:
        assert not found["wrapped"]
        assert found["shouted"]


def test_without_a_selection_it_is_a_trainer_like_any_other(both: list[Found]) -> None:
    for _, found in both:
        assert found["wrapped without a selection"]


def test_a_trainer_that_wraps_replicas_is_refused_and_told_of_the_other(both: list[Found]) -> None:
    for _, found in both:
        assert "trainer.SelectionTrainer in its place" in found["refusal"]
