"""Goals and claims against what was found: a bound holds when the whole interval is on its side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from evidence.findings import (
    Finding,
    equal_memory,
    find,
    in_points,
    metered,
    name_of,
    percent,
    pick,
    product,
    variant,
)
from evidence.plan import (
    EQUAL_MEMORY,
    FULL,
    LOCAL,
    MISLEADING,
    STAGES,
    Cell,
    ablated,
    at_random,
    by_factors,
    by_local,
    library,
    linear_only,
    neighbouring,
    of_layers,
    ours,
)
from evidence.runs import Choice, Store
from evidence.statistics import difference, interval

INFINITY = float("inf")


@dataclass(frozen=True)
class Verdict:
    goal: str
    model: str
    verdict: str
    """`holds`, `does not hold`, `undecided` or `not run yet`."""
    why: str


def judge(model: str, plan: Sequence[Cell], store: Store) -> list[Verdict]:
    """The goals, one by one. A bound holds when the whole interval is on its side, and fails when none of it is."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store)

    in_legal = [replace(each, goal=f"legal text: {each.goal}") for each in _goals(model, "legal", plan, store)]
    verdicts = [*_goals(model, "code", plan, store), *in_legal]
    for share in ablated(model):
        for name, blends in (("ours", ours), ("`select`", library)):
            cases = [blends(share, published, LOCAL) for published in ("code", *MISLEADING)]
            for beside, other in (("the local sample alone", by_local(share)), ("chance", at_random(share))):
                goal = f"{name}, at {share:.0%} and {LOCAL} local sequences, with any factors never worse than {beside}"
                verdicts.append(_worst(goal, model, [of(case) for case in cases], of(other)))
    return verdicts


def _goals(model: str, domain: str, plan: Sequence[Cell], store: Store) -> Iterator[Verdict]:
    """What is asked of ours in every domain."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store, domain)

    mine, factors = of(ours(0.1, domain)), of(by_factors(0.1, domain))
    yield at_least("at 10 % of the coordinates, at least 97 % of full fine-tuning's gain", model, mine, 0.97)
    yield _memory(model, mine, of(FULL))
    yield at_least("at 25 %, no worse than full fine-tuning", model, of(ours(0.25, domain)), 1.0)
    yield at_least("at 1 %, at least 75 %", model, of(ours(0.01, domain)), 0.75)
    yield at_least("published factors alone, at 10 %, at least 93 %", model, factors, 0.93)
    rivals, in_memory = _rivals_of(model, domain, plan), equal_memory(model, plan, domain)
    yield _rivals("parameters", model, mine, rivals, plan, store)
    yield _rivals("training memory", model, of(ours(EQUAL_MEMORY, domain)), in_memory, plan, store)
    in_linear = {share: of(linear_only(ours(share, domain))) for share in (0.01, 0.1, 0.25)}
    for share, words, bound in ((0.1, "at least 97 %", 0.97), (0.25, "no worse", 1.0), (0.01, "at least 75 %", 0.75)):
        yield at_least(f"in linear layers alone, at {STAGES[share]}, {words}", model, in_linear[share], bound)
    yield _rivals("parameters (ours in linear layers alone)", model, in_linear[0.1], rivals, plan, store)
    for name, rival in (
        ("published factors alone", factors),
        ("the local sample alone", of(by_local(0.1))),
        ("chance", of(at_random(0.1))),
    ):
        yield within(f"blended, at 10 % and {LOCAL} local sequences, never worse than {name}", model, mine, rival)


def at_least(goal: str, model: str, finding: Finding | None, bound: float) -> Verdict:
    """Whether the share of full fine-tuning's gain reaches the bound."""
    return _share_in(goal, model, finding, (bound, INFINITY))


def at_most(goal: str, model: str, finding: Finding | None, bound: float) -> Verdict:
    """Whether it stays below the bound."""
    return _share_in(goal, model, finding, (-INFINITY, bound))


def _share_in(goal: str, model: str, finding: Finding | None, bounds: tuple[float, float]) -> Verdict:
    if finding is None or finding.share_interval is None:
        return Verdict(goal, model, "not run yet", "")
    low, high = finding.share_interval
    why = f"{percent(finding.share)} [{percent(low)}, {percent(high)}], {len(finding.shares)} seeds"
    added = list(finding.added.values())
    if len(added) > 1:
        low_added, high_added = interval(added)
        mean = sum(added) / len(added)
        why += f"; the {len(added)} added alone {percent(mean)} [{percent(low_added)}, {percent(high_added)}]"
    return Verdict(goal, model, _on_its_side(low, high, *bounds), why)


def within(
    goal: str, model: str, mine: Finding | None, rival: Finding | None, low: float = 0.0, high: float = INFINITY
) -> Verdict:
    """Whether mine − rival, in shares of full fine-tuning's gain, lies within the bounds; by default not worse."""
    verdict = between(goal, model, mine.shares if mine else {}, rival.shares if rival else {}, (low, high))
    added = difference(mine.added, rival.added) if mine and rival else None
    if added is None:
        return verdict
    return replace(verdict, why=f"{verdict.why}; the {added.pairs} added alone {in_points(added)}")


def between(
    goal: str, model: str, mine: Mapping[int, float], rival: Mapping[int, float], bounds: tuple[float, float]
) -> Verdict:
    """The same of shares by seed."""
    found = difference(mine, rival)
    if found is None:
        return Verdict(goal, model, "not run yet", "")
    why = f"{in_points(found)} points, {found.pairs} seeds"
    return Verdict(goal, model, _on_its_side(found.low, found.high, *bounds), why)


def _on_its_side(low: float, high: float, least: float, most: float) -> str:
    if least <= low and high <= most:
        return "holds"
    return "does not hold" if high < least or low > most else "undecided"


def _memory(model: str, mine: Finding | None, full: Finding | None) -> Verdict:
    goal = "and at no more than a third of its training memory"
    if mine is None or full is None:
        return Verdict(goal, model, "not run yet", "")
    ratio = mine.mean("training_bytes") / full.mean("training_bytes")
    with_largest = (mine.mean("training_bytes") + mine.mean("largest_gradient_bytes")) / full.mean("training_bytes")
    verdict = "holds" if with_largest <= 1 / 3 else "undecided" if ratio <= 1 / 3 else "does not hold"
    return Verdict(
        goal,
        model,
        verdict,
        f"{percent(ratio)}; {percent(with_largest)} with the one whole gradient that exists for a moment",
    )


def _rivals_of(model: str, domain: str, plan: Sequence[Cell]) -> list[Cell]:
    """Every other arm of a tenth of the parameters; factors alone are part of ours, as are those of a neighbour."""
    no_rivals = (
        FULL,
        *neighbouring(0.1),
        by_factors(0.1, domain),
        *(arm for each in (ours(0.1, domain), library(0.1)) for arm in (each, linear_only(each))),
    )
    place = ("10 %", model, domain)
    return [each for each in plan if (each.stage, each.model, each.domain) == place and each.choice not in no_rivals]


def _rivals(
    of_equal: str, model: str, mine: Finding | None, cells: Sequence[Cell], plan: Sequence[Cell], store: Store
) -> Verdict:
    """Ours is ahead of a rival where the two intervals do not touch."""
    goal = f"at 10 %, better than every rival of equal {of_equal}, intervals apart"
    rivals = [each for each in cells if each.choice != FULL and (mine is None or each.choice != mine.cell.choice)]
    found = [finding for cell in rivals if (finding := find(cell, plan, store)) is not None and len(finding.shares) > 1]
    if mine is None or mine.share_interval is None or not found:
        return Verdict(goal, model, "not run yet", "")
    ahead = [
        each for each in found if each.share_interval is not None and mine.share_interval[0] > each.share_interval[1]
    ]
    not_ahead = [name_of(each.cell.choice) for each in found if each not in ahead]
    verdict = "undecided" if len(found) < len(rivals) else "does not hold" if not_ahead else "holds"
    of_all = f"ahead of {len(ahead)} of {len(rivals)}" + (f", {len(found)} of them run" * (len(found) < len(rivals)))
    return Verdict(goal, model, verdict, of_all + (f"; not of {', '.join(not_ahead)}" if not_ahead else ""))


def _worst(goal: str, model: str, cases: Sequence[Finding | None], rival: Finding | None) -> Verdict:
    """The case in which it is furthest behind."""
    run = [each for each in cases if each is not None and rival is not None and len(each.shares) > 1]
    if rival is None or not run:
        return Verdict(goal, model, "not run yet", "")
    compared = [(found.mean, each) for each in run if (found := difference(each.shares, rival.shares)) is not None]
    worst = min(compared, key=lambda pair: pair[0])[1]
    verdict = within(goal, model, worst, rival)
    return Verdict(goal, model, verdict.verdict, f"{name_of(worst.cell.choice)}: {verdict.why}")


# --- the paper's claims


def judge_claims(model: str, plan: Sequence[Cell], store: Store) -> list[Verdict]:
    """What the paper says or takes for granted, one by one."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store)

    def layers(rule: str) -> Finding | None:
        return of(of_layers(rule, 0.1))

    verdicts = [
        at_least("a tenth of the parameters gets nearly all of the gain: at least 90 %", model, of(ours(0.1)), 0.9)
    ]
    for claim, mine, rival in (
        (
            "submodules with a large gradient norm are those to train: at 10 % ahead of submodules at random",
            layers("norm"),
            layers("random"),
        ),
        ("within layers the gradient tells what to train: at 1 % ahead of chance", of(ours(0.01)), of(at_random(0.01))),
        ("the same at 10 %", of(ours(0.1)), of(at_random(0.1))),
        (
            f"a published blueprint spares the local gradients: at 10 % no worse than {LOCAL} local sequences",
            of(by_factors(0.1)),
            of(by_local(0.1)),
        ),
    ):
        verdicts.append(within(claim, model, mine, rival))
    for share in ablated(model):
        for published in MISLEADING:
            other = of(by_factors(share, published))
            if other is not None:
                claim = f"the right domain's factors alone, ahead of {variant(published)}, at {share:.0%}"
                verdicts.append(within(claim, model, of(by_factors(share)), other))
    verdicts.append(_time(model, plan, store))
    return [*verdicts, *_both(model, plan, store)]


def _both(model: str, plan: Sequence[Cell], store: Store) -> Iterator[Verdict]:
    """The paper's example, 20 % of the parameters × 30 % of the data, with Algorithm 2 choosing the data."""
    chosen, any_data = (product(model, data, plan, store) for data in ("predicted", "random"))
    on_chosen, on_any = (None if each is None else each.data for each in (chosen, any_data))
    both = None if chosen is None else chosen.both
    yield within("data by gradient: 30 % by Algorithm 2 ahead of any 30 %", model, on_chosen, on_any)
    yield at_least("30 % of the data by Algorithm 2 retains 90 %", model, on_chosen, 0.9)
    yield at_least("and with 20 % of the parameters 72 %", model, both, 0.72)
    goal, full = "and that at 6 % of the resource cost", pick(FULL, model, plan, store)
    if both is None or full is None:
        yield Verdict(goal, model, "not run yet", "")
        return
    training = both.mean("cpu_seconds") / full.mean("cpu_seconds")
    total = training + both.selection_seconds / full.mean("cpu_seconds")
    memory = both.mean("training_bytes") / full.mean("training_bytes")
    why = f"{percent(training)} of the training time, {percent(total)} with both choices, {percent(memory)} of memory"
    yield Verdict(goal, model, "holds" if max(total, memory) <= 0.06 else "does not hold", why)


def _time(model: str, plan: Sequence[Cell], store: Store) -> Verdict:
    claim = "a partial update is cheaper: at 10 % more gain for the processor time"
    found = metered(model, plan, store)
    mine, full = found.get(ours(0.1)), found.get(FULL)
    if mine is None or full is None:
        return Verdict(claim, model, "not run yet", "")
    everything, chosen = pick(FULL, model, plan, store), pick(ours(0.1), model, plan, store)
    assert everything is not None
    assert chosen is not None  # their rates were tuned for these runs
    gain, time = mine.gain / full.gain, mine.cpu_seconds / full.cpu_seconds
    with_selection = (mine.cpu_seconds + chosen.selection_seconds) / full.cpu_seconds
    times = [result.cpu_seconds for result in everything.results.values()]
    spread = (max(times) - min(times)) / everything.mean("cpu_seconds")
    difference_of_both = gain - with_selection
    verdict = (
        "undecided" if abs(difference_of_both) <= spread else "holds" if difference_of_both > 0 else "does not hold"
    )
    why = f"{percent(gain)} of the gain in {percent(time)} of the time of training, {percent(with_selection)} with the"
    return Verdict(claim, model, verdict, f"{why} selection; one run; times of equal work differ by {percent(spread)}")
