"""What samples say about gradients: moments of a local sample, factors of a published one, each computed once."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from demo.models import random_batches
from evidence.models import Batch, Subject
from gradient_blueprints import Blueprint
from gradient_blueprints.training.profiling import GradientProfiler

Array = npt.NDArray[np.float32]
PUBLISHED_BATCH = 8
LOCAL_SEED = 7_000
"""Added to a run's seed, so that no local sample is drawn like its training batches."""


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


def published_factors(subject: Subject, published: str, count: int, length: int) -> Factors:
    """What a lab publishes of a domain: the profiler's factors over `count` sequences in batches of 8.

    `domain*` is the same with rows and columns permuted within each tensor; `domain~25` is profiled on text of which
    a quarter of the sequences is of the domain and the rest English: a blueprint gone stale. `domain>` holds the
    factors of the squared movement of the weights when the lab fine-tunes on the published sample for one pass.
    """
    name = f"{published}-{count}x{length}"
    path = subject.work / "factors" / subject.name / f"{name}.safetensors"
    domain = published.rstrip("*>").split("~")[0]
    if not path.is_file() and published.endswith(">"):
        _save(_movement(subject, domain, count, length), path)
    if not path.is_file():
        batches = _published_batches(subject, published.rstrip("*"), count, length)
        _, factors_of_domain = profile(subject, batches, domain)
        found = {key.removeprefix(f"{domain}/"): each.numpy() for key, each in factors_of_domain.items()}
        _save(found, path)
    factors = _read_factors(path)
    return _permuted(factors) if published.endswith("*") else factors


def profile(subject: Subject, batches: list[Batch], domain: str) -> tuple[Blueprint, dict[str, Tensor]]:
    """The document and the factors that the library's profiler makes of given batches."""
    with GradientProfiler(subject.fresh(), verify=False) as profiler:
        for batch in batches:
            profiler.step(batch, domain=domain)
        return profiler.blueprint(subject.name, 1.0), profiler.factors()


def published_profile(subject: Subject, domain: str, count: int, length: int) -> tuple[Blueprint, dict[str, Tensor]]:
    """What a lab publishes, from the sequences of `published_factors`; of `domain*` the factors are permuted."""
    key = (subject.name, domain, count, length)
    if key not in _PROFILES:
        batches = _published_batches(subject, domain.rstrip("*"), count, length)
        document, factors = profile(subject, batches, domain.rstrip("*").split("~")[0])
        if domain.endswith("*"):
            factors = {name: torch.from_numpy(_shuffled(name, each.numpy())) for name, each in factors.items()}
        _PROFILES[key] = document, factors
    return _PROFILES[key]


_PROFILES: dict[tuple[str, str, int, int], tuple[Blueprint, dict[str, Tensor]]] = {}


def _published_batches(subject: Subject, published: str, count: int, length: int) -> list[Batch]:
    domain, _, percent = published.partition("~")
    batches = list(
        random_batches(subject.tokens(domain, "published"), count // PUBLISHED_BATCH, PUBLISHED_BATCH, length, 1)
    )
    if percent:
        english = random_batches(subject.tokens("english", "published"), len(batches), PUBLISHED_BATCH, length, 2)
        kept = round(PUBLISHED_BATCH * int(percent) / 100)
        for batch, other in zip(batches, english, strict=True):
            batch["input_ids"] = batch["labels"] = torch.cat([batch["input_ids"][:kept], other["input_ids"][kept:]])
    return batches


def _movement(subject: Subject, domain: str, count: int, length: int) -> dict[str, Array]:
    model = subject.fresh().train()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in _published_batches(subject, domain, count, length):
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


def _permuted(factors: Factors) -> Factors:
    return Factors(
        {name: _shuffled(f"{name}/row", values) for name, values in factors.row.items()},
        {name: _shuffled(f"{name}/column", values) for name, values in factors.column.items()},
    )


def _shuffled(name: str, values: Array) -> Array:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    order = list(range(len(values)))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    return np.asarray(values[order])
