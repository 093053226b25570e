"""Coarser layers out of finer ones are those of a direct run."""

import pytest

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Granularity
from gradient_blueprints.training.profiling import GradientProfiler
from tests.training.profiling.small_models import batch, build


def profile(architecture: str, groups: Granularity, statistics: str = "all") -> GradientProfiler:
    with GradientProfiler(build(architecture), groups=groups, statistics=statistics) as profiler:  # type: ignore[arg-type]
        for seed in range(3):
            profiler.step(batch(seed=seed))
            profiler.step(batch(seed=10 + seed), domain="bio")
    return profiler


def assert_alike(found: Blueprint, expected: Blueprint) -> None:
    assert [layer.id for layer in found.layers] == [layer.id for layer in expected.layers]
    for one, two in zip(found.layers, expected.layers, strict=True):
        for name, value in two.model_dump().items():
            if isinstance(value, float):  # the sixth digit may round another way
                assert getattr(one, name) == pytest.approx(value, rel=2e-6, abs=1e-12), (two.id, name)
            elif isinstance(value, dict) and name != "tail_fit":
                assert getattr(one, name) == pytest.approx(value, rel=2e-6), (two.id, name)
            elif name == "retained_mass" and value is not None:
                for mine, theirs in zip(one.retained_mass or (), value, strict=True):
                    assert mine == pytest.approx(theirs, rel=2e-6)
            else:
                assert one.model_dump()[name] == value, (two.id, name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_submodules_and_blocks_from_tensors_are_those_of_a_direct_run(architecture: str) -> None:
    finest = profile(architecture, "tensor")
    submodules, blocks = profile(architecture, "submodule"), profile(architecture, "block")
    assert_alike(finest.blueprint("m", 1.0, groups="submodule"), submodules.blueprint("m", 1.0))
    assert_alike(finest.blueprint("m", 1.0, groups="block"), blocks.blueprint("m", 1.0))
    assert_alike(submodules.blueprint("m", 1.0, groups="block"), blocks.blueprint("m", 1.0))
    assert finest.blueprint("m", 1.0, groups="tensor") == finest.blueprint("m", 1.0)


def test_norms_of_batches_alone_coarsen_too() -> None:
    found = profile("llama", "tensor", "batches").blueprint("m", 1.0, groups="block")
    assert_alike(found, profile("llama", "block", "batches").blueprint("m", 1.0))


def test_finer_layers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="profile finer ones"):
        profile("llama", "block", "batches").blueprint("m", 1.0, groups="submodule")
