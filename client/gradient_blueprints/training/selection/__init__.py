"""What to train: Algorithm 1 of the paper, down to the coordinates within each matrix."""

from gradient_blueprints.allocation import (
    BYTES_PER_COORDINATE,
    BYTES_PER_DENSE_PARAMETER,
    default_trust,
    spread,
)
from gradient_blueprints.knapsack import knapsack
from gradient_blueprints.training.selection.budgets import Budget
from gradient_blueprints.training.selection.chosen import SelectedLayer, Selection, Units
from gradient_blueprints.training.selection.indices import Scores
from gradient_blueprints.training.selection.local import LocalStatistics, mean_gradients
from gradient_blueprints.training.selection.scores import (
    Score,
    blended,
    empirical_bayes,
    local_gradient,
    local_rms,
    published_factors,
    random_coordinates,
)
from gradient_blueprints.training.selection.select import DEFAULT_SCORE, ScoreName, Unit, select

__all__ = [
    "BYTES_PER_COORDINATE",
    "BYTES_PER_DENSE_PARAMETER",
    "DEFAULT_SCORE",
    "Budget",
    "LocalStatistics",
    "Score",
    "ScoreName",
    "Scores",
    "SelectedLayer",
    "Selection",
    "Unit",
    "Units",
    "blended",
    "default_trust",
    "empirical_bayes",
    "knapsack",
    "local_gradient",
    "local_rms",
    "mean_gradients",
    "published_factors",
    "random_coordinates",
    "select",
    "spread",
]
