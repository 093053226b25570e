"""What is dubious but legal in a blueprint: stored as sent, answered with named warnings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from gradient_blueprints.models import Blueprint, Warning_

GAMMA_TOLERANCE = 0.006  # gamma is usually printed with two decimals
_MOST_WARNINGS = 1_000


def review(blueprint: Blueprint) -> tuple[Warning_, ...]:
    """Named warnings, each pointing to its place; at most 1,000."""
    return tuple(islice(_warnings(blueprint), _MOST_WARNINGS))


def _warnings(blueprint: Blueprint) -> Iterator[Warning_]:
    if all(layer.gradient_norm == 0 for layer in blueprint.layers):
        yield Warning_(code="no_positive_norm", pointer="/layers", detail="every gradient norm is zero")
    for index, layer in enumerate(blueprint.layers):
        place = f"/layers/{index}"
        if layer.alpha is not None and not 1 < layer.alpha < 2:
            yield Warning_(
                code="alpha_outside_1_2",
                pointer=f"{place}/alpha",
                detail=f"{layer.alpha:g} lies outside (1, 2), the range that the paper assumes",
            )
        if layer.alpha is not None and layer.gamma is not None:
            expected = 1 / (1 + layer.alpha)
            if abs(layer.gamma - expected) > GAMMA_TOLERANCE:
                yield Warning_(
                    code="gamma_not_from_alpha",
                    pointer=f"{place}/gamma",
                    detail=f"{layer.gamma:g} is not 1/(1 + alpha) = {expected:.4g}",
                )
        if layer.k_star is not None and layer.k_star > 1:
            yield Warning_(
                code="k_star_above_one",
                pointer=f"{place}/k_star",
                detail=f"{layer.k_star:g} is above 1; it is read as 1, the full update",
            )
