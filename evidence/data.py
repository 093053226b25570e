"""What a run is trained on: the same batches for all arms of one seed, or the best of them by a strategy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from demo.models import random_batches
from evidence.gradients import local_sample
from evidence.models import Batch, Subject
from evidence.plan import LOCAL, SIZES
from evidence.runs import Run
from gradient_blueprints.training.data_selection import GradientNorm, Scores, Strategy, fit_influence, keep_top
from gradient_blueprints.training.gradient_similarity import GradientSimilarity

_KEPT = 4
_SCORES: OrderedDict[tuple[Any, ...], Scores] = OrderedDict()


def training_batches(subject: Subject, run: Run) -> list[Batch]:
    """As many batches as the run has steps.

    Data that are chosen are chosen from the whole pass that the other runs of the seed make, and keep its order.
    """
    if run.data == "random":
        return _pool(subject, run, run.steps)
    pool = _pool(subject, run, SIZES[run.model][0])
    index = keep_top(_scores(subject, run, pool), run.steps / len(pool))
    rows = torch.cat([batch["input_ids"] for batch in pool])[torch.from_numpy(index)]
    return [{"input_ids": ids, "labels": ids} for ids in torch.split(rows, run.batch)]


def _pool(subject: Subject, run: Run, steps: int) -> list[Batch]:
    return list(random_batches(subject.tokens(run.domain, "training"), steps, run.batch, run.length, seed=run.seed))


def _scores(subject: Subject, run: Run, pool: list[Batch]) -> Scores:
    """Of every sequence of the pool; the last few are kept, since runs of one seed share them."""
    key = (subject.name, run.domain, run.data, run.length, run.seed)
    if key not in _SCORES:
        _SCORES[key] = _STRATEGIES[run.data](subject, run)(subject.fresh(), pool)
        while len(_SCORES) > _KEPT:
            _SCORES.popitem(last=False)
    return _SCORES[key]


def _predicted(subject: Subject, run: Run) -> Strategy:
    """Algorithm 2: exact J of the local sample, f_φ for the pool."""
    return fit_influence(subject.fresh(), _local(subject, run))


def _influence(subject: Subject, run: Run) -> Strategy:
    return GradientNorm()


def _similar(subject: Subject, run: Run) -> Strategy:
    return GradientSimilarity(tuple(_local(subject, run)))


def _local(subject: Subject, run: Run) -> list[Batch]:
    return local_sample(subject, run.domain, LOCAL, run.length, run.seed)


_STRATEGIES: dict[str, Callable[[Subject, Run], Strategy]] = {
    "predicted": _predicted,
    "influence": _influence,
    "similar": _similar,
}
