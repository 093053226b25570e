"""The registry's staleness check of a published document, without the service around it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from types import SimpleNamespace

import torch

from app.registry.blueprints import Found
from app.registry.staleness import judge, side_of_rows, side_of_sample
from demo import adapting
from evidence.gradients import PUBLISHED_BATCH
from evidence.models import Batch, Subject
from gradient_blueprints import Blueprint
from gradient_blueprints.canonical import canonical_bytes, digest_of
from gradient_blueprints.statistics_methods import local_sample
from gradient_blueprints.statistics_models import GENERAL, Staleness, StalenessRequest, plain
from gradient_blueprints.training.profiling import GradientProfiler


def check_staleness(subject: Subject, published: Blueprint, sample: Sequence[Batch], domain: str) -> Staleness:
    """What the registry answers to a sample's gradient norms, batch by batch.

    `sample` holds sequences one by one; they are put together in batches as large as those of the published sample, of
    which intervals need four.
    """
    local = local_sample(norms_by_batch(subject, sample, domain), "gradient_norm")
    other = digest_of(canonical_bytes(plain(local)))
    document = digest_of(canonical_bytes(plain(published)))
    found = Found(0, 0, bytes.fromhex(document.removeprefix("sha256:")), 0, 1, "lab", subject.name, Decimal(1), None)
    request = StalenessRequest(local=local)
    return judge(
        found,
        side_of_rows(_rows(published), "gradient_norm"),
        side_of_sample(local),
        request,
        "gradient_norm",
        GENERAL,
        other,
    )


def norms_by_batch(subject: Subject, sample: Sequence[Batch], domain: str) -> dict[str, list[float]]:
    """Of every layer the norm of each batch's gradient."""
    ids = torch.cat([each["input_ids"] for each in sample])
    with GradientProfiler(subject.fresh(), verify=False) as profiler:
        for batch in torch.split(ids, PUBLISHED_BATCH):
            profiler.step({"input_ids": batch, "labels": batch}, domain=domain)
        return adapting.norms_by_batch(profiler, domain)


def _rows(document: Blueprint) -> list[SimpleNamespace]:
    """A document's layers as the registry's tables hold them."""
    rows = []
    for layer in document.layers:
        low, high = layer.gradient_norm_ci or (None, None)
        rows.append(
            SimpleNamespace(
                layer_id=layer.id,
                gradient_norm=layer.gradient_norm,
                gradient_norm_low=low,
                gradient_norm_high=high,
                parameters=layer.parameters,
                kind=layer.kind,
                depth=layer.depth,
            )
        )
    return rows
