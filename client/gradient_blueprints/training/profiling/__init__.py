"""Exact per-layer gradient statistics of a model, in one backward pass per batch."""

from gradient_blueprints.training.profiling.profiler import GradientProfiler
from gradient_blueprints.training.profiling.state import ProfileState, merge

__all__ = ["GradientProfiler", "ProfileState", "merge"]
