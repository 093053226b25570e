"""Goals and claims against what was found: a bound holds when the whole interval is on its side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from evidence.findings import (
    Finding,
    at_constant_rate,
    equal_memory,
    find_all,
    in_points,
    metered,
    name_of,
    percent,
    pick,
    product,
    variant,
)
from evidence.plan import (
    DEFAULT,
    EQUAL_MEMORY,
    FULL,
    LOCAL,
    LOCAL_SIZES,
    MISLEADING,
    STAGES,
    Cell,
    ablated,
    at_random,
    by_factors,
    by_local,
    cells_of,
    library,
    linear_only,
    of_layers,
    ours,
)
from evidence.runs import Choice, Store
from evidence.statistics import difference, interval
from gradient_blueprints.training.selection.budgets import TIED_GRADIENTS

INFINITY = float("inf")
KNOWN = " (a goal set when this was known)"
STATISTICS_BYTES = 4
"""What `LocalStatistics.gather` keeps of a coordinate in float32; half of it in bfloat16."""
RANKING_BYTES = 12
"""A coordinate of the tensor that `select` ranks, at a tenth: 4 its score, less than 8 the choice of the best."""


@dataclass(frozen=True)
class Verdict:
    goal: str
    model: str
    verdict: str
    """`holds`, `does not hold`, `undecided` or `not run yet`, and what to add to it."""
    why: str


def judge(model: str, plan: Sequence[Cell], store: Store) -> list[Verdict]:
    """The goals, one by one. A bound holds when the whole interval is on its side, and fails when none of it is."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store)

    in_legal = [replace(each, goal=f"legal text: {each.goal}") for each in _goals(model, "legal", plan, store)]
    verdicts = [*_goals(model, "code", plan, store), *in_legal]
    for share in ablated(model):
        verdicts += _safety(share, model, of)
    return verdicts


def _safety(share: float, model: str, of: Callable[[Choice], Finding | None]) -> Iterator[Verdict]:
    """Whether a blend is ever worse than what it is blended of, or than chance: every case that the plan has."""
    chance, factors = of(at_random(share)), of(by_factors(share))
    local = {size: of(by_local(share, size)) for size in LOCAL_SIZES}
    for name, blend, sizes in (("ours", ours, LOCAL_SIZES), ("`select`", library, (8, LOCAL))):
        right = {size: of(blend(share, "code", size)) for size in sizes}
        goal = f"{name}, at {STAGES[share]}, with the right factors and any number of local sequences, never worse than"
        against_factors = [(each, factors) for each in right.values()]
        yield never_worse(f"{goal} the factors alone", model, against_factors)
        yield never_worse(f"{goal} the local sample alone", model, [(right[size], local[size]) for size in sizes])
        misled = [of(blend(share, published, LOCAL)) for published in MISLEADING]
        goal = f"{name}, at {STAGES[share]} and {LOCAL} local sequences, with any factors never worse than"
        for beside, rival in (("the local sample alone", local[LOCAL]), ("chance", chance)):
            yield never_worse(f"{goal} {beside}", model, [(each, rival) for each in (right[LOCAL], *misled)])


def _goals(model: str, domain: str, plan: Sequence[Cell], store: Store) -> Iterator[Verdict]:
    """What is asked of ours in every domain."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store, domain)

    mine, factors = of(ours(0.1, domain)), of(by_factors(0.1, domain))
    yield at_least("at 10 % of the coordinates, at least 97 % of full fine-tuning's gain", model, mine, 0.97)
    yield memory(model, mine, of(FULL))
    yield at_least("at 25 %, no worse than full fine-tuning", model, of(ours(0.25, domain)), 1.0)
    yield at_least("at 1 %, at least 75 %", model, of(ours(0.01, domain)), 0.75)
    yield at_least("published factors alone, at 10 %, at least 93 %", model, factors, 0.93)
    rivals, in_memory = cells_of("10 %", model, domain, plan), equal_memory(model, plan, domain)
    yield _rivals("parameters", model, mine, rivals, plan, store)
    yield _rivals("training memory", model, of(ours(EQUAL_MEMORY, domain)), in_memory, plan, store)
    in_linear = {share: of(linear_only(ours(share, domain))) for share in (0.01, 0.1, 0.25)}
    known = KNOWN if domain == "code" else ""
    for share, words, bound in ((0.1, "at least 97 %", 0.97), (0.25, "no worse", 1.0), (0.01, "at least 75 %", 0.75)):
        goal = f"in linear layers alone, at {STAGES[share]}, {words}" + ("" if share == 0.25 else known)
        yield at_least(goal, model, in_linear[share], bound)
    yield _rivals(f"parameters (ours in linear layers alone){known}", model, in_linear[0.1], rivals, plan, store)
    if domain == "code":
        in_linear_memory = of(linear_only(ours(EQUAL_MEMORY)))
        words = "training memory (ours in linear layers alone)"
        yield _rivals(words, model, in_linear_memory, in_memory, plan, store)
    if domain == "code":
        chosen = "`select` of the library, at"
        yield at_least(f"{chosen} 10 %, at least 97 %{KNOWN}", model, of(library(0.1)), 0.97)
        yield at_least(f"{chosen} 1 %, at least 75 %{KNOWN}", model, of(library(0.01)), 0.75)
        constant = at_constant_rate(model, plan, store).get(ours(0.1))
        yield at_least(f"at 10 %, at least 97 %, both at a constant rate{KNOWN}", model, constant, 0.97)
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
    verdict = on_its_side(low, high, *bounds)
    why = f"{percent(finding.share)} [{percent(low)}, {percent(high)}], {len(finding.shares)} seeds"
    later = list(finding.later.values())
    if len(later) > 1:
        its_low, its_high = interval(later)
        mean = sum(later) / len(later)
        why += f"; the {len(later)} later alone {percent(mean)} [{percent(its_low)}, {percent(its_high)}]"
        verdict = also_alone(verdict, on_its_side(its_low, its_high, *bounds))
    return Verdict(goal, model, verdict, why)


def within(
    goal: str, model: str, mine: Finding | None, rival: Finding | None, low: float = 0.0, high: float = INFINITY
) -> Verdict:
    """Whether mine − rival, in shares of full fine-tuning's gain, lies within the bounds; by default not worse."""
    verdict = between(goal, model, mine.shares if mine else {}, rival.shares if rival else {}, (low, high))
    later = difference(mine.later, rival.later) if mine and rival else None
    if later is None:
        return verdict
    alone = on_its_side(later.low, later.high, low, high)
    why = f"{verdict.why}; the {later.pairs} later alone {in_points(later)}"
    return replace(verdict, verdict=also_alone(verdict.verdict, alone), why=why)


def between(
    goal: str, model: str, mine: Mapping[int, float], rival: Mapping[int, float], bounds: tuple[float, float]
) -> Verdict:
    """The same of shares by seed."""
    found = difference(mine, rival)
    if found is None:
        return Verdict(goal, model, "not run yet", "")
    why = f"{in_points(found)} points, {found.pairs} seeds" + (
        ", equal runs" if found.p == 1 and not found.mean else ""
    )
    return Verdict(goal, model, on_its_side(found.low, found.high, *bounds), why)


def on_its_side(low: float, high: float, least: float, most: float) -> str:
    """Of an interval and the bounds that it should lie in."""
    if least <= low and high <= most:
        return "holds"
    return "does not hold" if high < least or low > most else "undecided"


def also_alone(verdict: str, later: str) -> str:
    """A verdict that the seeds which were added afterwards do not bear out by themselves says so."""
    return verdict if verdict in ("undecided", later) else f"{verdict}; the later seeds alone: {later}"


def memory(model: str, mine: Finding | None, full: Finding | None) -> Verdict:
    goal = "and at no more than a third of its training memory"
    if mine is None or full is None:
        return Verdict(goal, model, "not run yet", "")
    gradient, parameters = mine.mean("largest_gradient_bytes"), mine.mean("parameters")
    held, moment = mine.mean("training_bytes"), TIED_GRADIENTS * gradient
    full_held, full_moment = full.mean("training_bytes"), (TIED_GRADIENTS - 1) * gradient
    ranking, sample = RANKING_BYTES * gradient / STATISTICS_BYTES, STATISTICS_BYTES * parameters

    def of_full(*parts: float) -> float:
        return sum(parts) / (full_held + full_moment)

    step = of_full(held, moment)
    halved, whole = ([of_full(kept, each) for each in (moment, ranking)] for kept in (sample / 2, sample))
    why = (
        f"{percent(held / full_held)} held; at the peak, with {TIED_GRADIENTS} gradients of the tied embedding that "
        f"both see for a moment, {percent(step)}; with a local sample in bfloat16 {percent(halved[0])} while "
        f"`LocalStatistics` measures it and {percent(halved[1])} while `select` ranks the embedding by it, in main "
        f"memory; in float32 {percent(whole[0])} and {percent(whole[1])}"
    )
    verdict = "holds" if max(held / full_held, step, *halved) <= 1 / 3 else "does not hold"
    if verdict == "holds" and max(whole) > 1 / 3:
        verdict = "holds with the sample in bfloat16, not in float32"
    return Verdict(goal, model, verdict, why)


def _is_rival(choice: Choice) -> bool:
    """Not full fine-tuning, nor one of ours; published factors alone are part of ours."""
    ranked_here = choice.arm == "coordinates" and choice.score.removeprefix("linear+") in (DEFAULT, "published")
    return not (choice == FULL or choice.arm == "library" or ranked_here)


def _rivals(
    of_equal: str, model: str, mine: Finding | None, cells: Sequence[Cell], plan: Sequence[Cell], store: Store
) -> Verdict:
    rivals = [each for each in cells if _is_rival(each.choice)]
    found = find_all(rivals, plan, store)
    goal = f"at 10 %, better than every rival of equal {of_equal}, intervals apart"
    return better_than_all(goal, model, mine, found, len(rivals))


def better_than_all(goal: str, model: str, mine: Finding | None, rivals: Sequence[Finding], planned: int) -> Verdict:
    """Ours is ahead of a rival where the two intervals do not touch; a rival that is ahead of ours refutes the goal."""
    apart = [(each, each.share_interval) for each in rivals if each.share_interval is not None]
    if mine is None or mine.share_interval is None or not apart:
        return Verdict(goal, model, "not run yet", "")
    low, high = mine.share_interval
    ahead = [each for each, its in apart if its[1] < low]
    behind = [each for each, its in apart if its[0] > high]
    touching = [each for each, _ in apart if each not in ahead and each not in behind]
    verdict = "does not hold" if behind else "holds" if len(ahead) == planned else "undecided"
    parts = [f"ahead of {len(ahead)} of {planned}{_missing(len(apart), planned)}"]
    for words, those in (("behind", behind), ("not apart from", touching)):
        parts += [f"{words} {', '.join(name_of(each.cell.choice) for each in those)}"] if those else []
    return Verdict(goal, model, verdict, "; ".join(parts))


def never_worse(
    goal: str, model: str, cases: Sequence[tuple[Finding | None, Finding | None]], margin: float = 0.0
) -> Verdict:
    """Refuted by one case worse than by the margin for certain; holds when all have been run and none may be worse."""
    known = [
        (found, mine, rival)
        for mine, rival in cases
        if mine and rival and (found := difference(mine.shares, rival.shares)) is not None
    ]
    if not known:
        return Verdict(goal, model, "not run yet", "")
    known.sort(key=lambda case: case[0].mean)
    worse = [case for case in known if case[0].high < -margin]
    holds = len(known) == len(cases) and all(found.low >= -margin for found, _, _ in known)
    told = "; ".join(
        f"{name_of(mine.cell.choice)}: {within('', model, mine, rival).why}" for _, mine, rival in (worse or known)[:2]
    )
    by = f" by more than {100 * margin:g} points" if margin else ""
    why = f"worse{by} in {len(worse)} of {len(known)} cases" + _missing(len(known), len(cases))
    return Verdict(goal, model, "does not hold" if worse else "holds" if holds else "undecided", f"{why}; {told}")


def _missing(known: int, planned: int) -> str:
    return f" ({planned - known} not run)" if known < planned else ""


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
