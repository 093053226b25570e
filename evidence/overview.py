"""The page's first table: what the main arms have of full fine-tuning's gain, and how many verdicts went which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from evidence.findings import Finding, pick
from evidence.plan import (
    STAGES,
    Cell,
    at_random,
    by_factors,
    by_local,
    evenly,
    library,
    linear_only,
    of_layers,
    ours,
    spread,
)
from evidence.runs import Choice, Store
from evidence.tables import table, with_interval
from evidence.verdicts import Verdict

Arm = Callable[[float, str], Choice]
"""By share of the parameters and domain."""
ARMS: dict[str, Arm] = {
    "ours: largest by factors and local sample": ours,
    "ours, in linear layers alone": lambda share, domain: linear_only(ours(share, domain)),
    "`select` of the library": library,
    "`select` with even fractions": evenly,
    "`select` at temperature 2": spread,
    "published factors alone": by_factors,
    "local sample alone": lambda share, domain: by_local(share),
    "coordinates at random": lambda share, domain: at_random(share),
    "the same in linear layers alone": lambda share, domain: linear_only(at_random(share)),
    "SHiRA": lambda share, domain: Choice("shira", share=share),
    "LoRA": lambda share, domain: Choice("lora", share=share),
    "whole layers by plain norm (the paper)": lambda share, domain: of_layers("norm", share, domain),
    "whole layers at random": lambda share, domain: of_layers("random", share, domain),
}
KINDS = ("holds", "does not hold", "undecided", "not run yet")


def overview(
    models: Sequence[str], verdicts: Mapping[str, Sequence[Verdict]], plan: Sequence[Cell], store: Store
) -> Iterator[str]:
    """A table for each model, and one that counts verdicts by what they are on."""
    for model in models:
        places = {(cell.domain, cell.choice.share) for cell in plan if cell.model == model}
        columns = sorted((domain, share) for domain, share in places if share in STAGES)
        rows = []
        for name, arm in ARMS.items():
            found = [pick(arm(share, domain), model, plan, store, domain) for domain, share in columns]
            if any(found):
                rows.append([name, *(_cell(each) for each in found)])
        yield f"`{model}`:"
        yield table(["Trained", *(f"{domain}, {STAGES[share]}" for domain, share in columns)], rows)
    yield table(
        ["Verdicts on", "Model", *KINDS],
        [
            [of, f"`{model}`", *_counts([each for each in those if each.model == model])]
            for of, those in verdicts.items()
            for model in dict.fromkeys(each.model for each in those)
        ],
    )


def _cell(found: Finding | None) -> str:
    return "" if found is None else with_interval(list(found.shares.values()))


def _counts(verdicts: Sequence[Verdict]) -> list[str]:
    counts = Counter(next(kind for kind in KINDS if each.verdict.startswith(kind)) for each in verdicts)
    return [str(counts[kind]) for kind in KINDS]
