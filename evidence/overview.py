"""The page's first table: what the main arms have of full fine-tuning's gain, and how many verdicts went which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from evidence.findings import Finding, pick
from evidence.hypotheses import judge_hypotheses
from evidence.plan import (
    SERIES,
    STAGES,
    Cell,
    at_random,
    by_factors,
    by_local,
    library,
    linear_only,
    of_layers,
    ours,
    spread,
)
from evidence.runs import Choice, Store
from evidence.tables import table, with_interval
from evidence.verdicts import Verdict, judge, judge_claims

Arm = Callable[[float, str], Choice]
"""By share of the parameters and domain."""
ARMS: dict[str, Arm] = {
    "ours: largest by factors and local sample": ours,
    "ours, in linear layers alone": lambda share, domain: linear_only(ours(share, domain)),
    "`select` of the library": library,
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


def overview(models: Sequence[str], plan: Sequence[Cell], store: Store) -> Iterator[str]:
    """A table for each model and for the second GPT, and one of verdicts."""
    for model in (*models, SERIES):
        places = {(cell.domain, cell.choice.share) for cell in plan if cell.model == model}
        columns = sorted((domain, share) for domain, share in places if share in STAGES)
        rows = []
        for name, arm in ARMS.items():
            found = [pick(arm(share, domain), model, plan, store, domain) for domain, share in columns]
            if any(found):
                rows.append([name, *(_cell(each) for each in found)])
        yield f"`{model}`:"
        yield table(["Trained", *(f"{domain}, {STAGES[share]}" for domain, share in columns)], rows)
    rows = []
    for of, judged, those in (
        ("goals", judge, models),
        ("predictions", judge_hypotheses, (*models, SERIES)),
        ("claims of the paper", judge_claims, models),
    ):
        rows += [[of, f"`{model}`", *_counts(judged(model, plan, store))] for model in those]
    yield table(["Verdicts on", "Model", *KINDS], rows)


def _cell(found: Finding | None) -> str:
    return "" if found is None else with_interval(list(found.shares.values()))


def _counts(verdicts: Sequence[Verdict]) -> list[str]:
    counts = Counter(next(kind for kind in KINDS if each.verdict.startswith(kind)) for each in verdicts)
    return [str(counts[kind]) for kind in KINDS]
