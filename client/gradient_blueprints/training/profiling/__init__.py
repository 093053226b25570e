"""Exact per-layer gradient statistics of a model, in one backward pass per batch."""

from gradient_blueprints.training.profiling.cost import CostEstimate, estimate_cost
from gradient_blueprints.training.profiling.distributed import gather_states
from gradient_blueprints.training.profiling.precision import Until
from gradient_blueprints.training.profiling.privacy import Privacy
from gradient_blueprints.training.profiling.profiler import GradientProfiler
from gradient_blueprints.training.profiling.state import ProfileState, merge
from gradient_blueprints.training.profiling.state_files import load_state, save_state

__all__ = [
    "CostEstimate",
    "GradientProfiler",
    "Privacy",
    "ProfileState",
    "Until",
    "estimate_cost",
    "gather_states",
    "load_state",
    "merge",
    "save_state",
]
