"""What samples say about gradients: moments of a local sample, factors of a published one, each computed once."""

from __future__ import annotations

import hashlib
import os
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from demo.models import random_batches
from evidence.models import Batch, Subject
from evidence.runs import Published
from gradient_blueprints import Blueprint
from gradient_blueprints.training.profiling import GradientProfiler

Array = npt.NDArray[np.float32]
PUBLISHED_BATCH = 8
LOCAL_SEED = 7_000
"""Added to a run's seed, so that no local sample is drawn like its training batches."""
PUBLISHED_SEED = 8_000
"""The same of a published sample that is drawn anew for each seed."""


@dataclass(frozen=True)
class Moments:
    """Per tensor, over `count` sequences: the mean gradient and the mean of its square, each of the tensor's shape."""

    count: int
    mean: dict[str, Array]
    square: dict[str, Array]


@dataclass(frozen=True)
class Factors:
    """Per tensor: row and column means of a second moment; a vector has its second moment as row and no column."""

    row: dict[str, Array]
    column: dict[str, Array]

    def second_moment(self, name: str, shape: tuple[int, ...]) -> Array:
        """row × column / mean(row), of the tensor's shape."""
        row, column = self.row[name], self.column.get(name)
        if column is None:
            return row.reshape(shape)
        return np.asarray(row[:, None] * column[None] / max(float(row.mean()), 1e-30), np.float32).reshape(shape)


def sample(subject: Subject, domain: str, part: str, count: int, length: int, seed: int) -> list[Batch]:
    """`count` sequences one by one."""
    tokens = subject.tokens(domain, part)
    return list(random_batches(tokens, count, 1, length, seed))


def local_sample(subject: Subject, domain: str, count: int, length: int, seed: int) -> list[Batch]:
    """What an adapter has of their own, by the run's seed."""
    return sample(subject, domain, "local", count, length, LOCAL_SEED + seed)


def local_moments(subject: Subject, domain: str, count: int, length: int, seed: int, autocast: bool) -> Moments:
    """Moments of a local sample."""
    return moments(subject, local_sample(subject, domain, count, length, seed), autocast)


def moments(subject: Subject, batches: list[Batch], autocast: bool) -> Moments:
    """Moments over given batches, each of them one observation."""
    model = subject.fresh().eval()
    mean = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    square = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            mean[name] += parameter.grad / len(batches)
            square[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(batches))
            parameter.grad = None
    return Moments(
        len(batches),
        {name: each.numpy() for name, each in mean.items()},
        {name: each.numpy() for name, each in square.items()},
    )


def published_factors(subject: Subject, name: str, count: int, length: int, seed: int) -> Factors:
    """What a lab publishes (`Published`): the profiler's factors over `count` sequences in batches of 8."""
    published = Published.parse(name)
    domain = name.rstrip("*#") + (f"#{seed}" if published.own_sample else "")
    path = subject.work / "factors" / subject.name / f"{domain}-{count}x{length}.safetensors"
    if not path.is_file() and published.moved:
        _save(_movement(subject, published, count, length, seed), path)
    if not path.is_file():
        batches = _published_batches(subject, published, count, length, seed)
        _, factors_of_domain = profile(subject.at(published.fraction), batches, published.domain)
        found = {key.removeprefix(f"{published.domain}/"): each.numpy() for key, each in factors_of_domain.items()}
        _save(found, path)
    factors = _read_factors(path)
    return _permuted(factors, _order(published, seed)) if published.permuted else factors


def profile(subject: Subject, batches: list[Batch], domain: str) -> tuple[Blueprint, dict[str, Tensor]]:
    """The document and the factors that the library's profiler makes of given batches."""
    with GradientProfiler(subject.fresh(), verify=False) as profiler:
        for batch in batches:
            profiler.step(batch, domain=domain)
        return profiler.blueprint(subject.name, 1.0), profiler.factors()


def published_profile(
    subject: Subject, name: str, count: int, length: int, seed: int
) -> tuple[Blueprint, dict[str, Tensor]]:
    """What a lab publishes, from the sequences of `published_factors`; of `domain*` the factors are permuted."""
    published = Published.parse(name)
    key = (subject.name, name, count, length, seed if published.by_seed else 0)
    if key not in _PROFILES:
        batches = _published_batches(subject, published, count, length, seed)
        document, factors = profile(subject.at(published.fraction), batches, published.domain)
        if published.permuted:
            order = _order(published, seed)
            factors = {
                tensor: torch.from_numpy(_shuffled(order + tensor, each.numpy())) for tensor, each in factors.items()
            }
        _PROFILES[key] = document, factors
        while len(_PROFILES) > _KEPT_PROFILES:
            _PROFILES.popitem(last=False)
    return _PROFILES[key]


_PROFILES: OrderedDict[tuple[str, str, int, int, int], tuple[Blueprint, dict[str, Tensor]]] = OrderedDict()
_KEPT_PROFILES = 8


def _published_batches(subject: Subject, published: Published, count: int, length: int, seed: int) -> list[Batch]:
    tokens, batches_of = subject.tokens(published.domain, "published"), count // PUBLISHED_BATCH
    drawn = PUBLISHED_SEED + seed if published.own_sample else 1
    batches = list(random_batches(tokens, batches_of, PUBLISHED_BATCH, length, drawn))
    if published.percent < 100:
        english = random_batches(subject.tokens("english", "published"), len(batches), PUBLISHED_BATCH, length, 2)
        kept = round(PUBLISHED_BATCH * published.percent / 100)
        for batch, other in zip(batches, english, strict=True):
            batch["input_ids"] = batch["labels"] = torch.cat([batch["input_ids"][:kept], other["input_ids"][kept:]])
    return batches


def _movement(subject: Subject, published: Published, count: int, length: int, seed: int) -> dict[str, Array]:
    model = subject.fresh().train()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in _published_batches(subject, published, count, length, seed):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, Array] = {}
    for name, parameter in model.named_parameters():
        square = (parameter.detach() - before[name]).square()
        found[f"{name}/row"] = (square if square.dim() < 2 else square.mean(1)).numpy()
        if square.dim() > 1:
            found[f"{name}/column"] = square.mean(0).numpy()
    return found


def _save(found: dict[str, Array], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    save_file(found, partial)
    partial.rename(path)


def _read_factors(path: Path) -> Factors:
    row: dict[str, Array] = {}
    column: dict[str, Array] = {}
    for key, value in load_file(path).items():
        name, _, kind = key.rpartition("/")
        (row if kind == "row" else column)[name] = value
    return Factors(row, column)


def _order(published: Published, seed: int) -> str:
    """What makes one permutation differ from another; nothing for the one that all seeds share."""
    return f"{seed}:" if published.by_seed else ""


def _permuted(factors: Factors, order: str) -> Factors:
    return Factors(
        {name: _shuffled(f"{order}{name}/row", values) for name, values in factors.row.items()},
        {name: _shuffled(f"{order}{name}/column", values) for name, values in factors.column.items()},
    )


def _shuffled(name: str, values: Array) -> Array:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    order = list(range(len(values)))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    return np.asarray(values[order])
