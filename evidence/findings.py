"""What stored runs say about each cell of the plan: shares of full fine-tuning's gain, differences, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evidence.plan import FULL, LOCAL, Cell, at_random, by_factors, by_local, library, of_layers, ours
from evidence.runs import Choice, Result, Store
from evidence.statistics import Difference, difference, holm, interval


@dataclass(frozen=True)
class Finding:
    """One cell, over the seeds that full fine-tuning has too."""

    cell: Cell
    rate: float | None
    results: Mapping[int, Result]
    shares: Mapping[int, float]
    """By seed: (base − loss) / (base − full's loss of that seed)."""

    @property
    def share(self) -> float:
        return sum(self.shares.values()) / len(self.shares)

    @property
    def share_interval(self) -> tuple[float, float] | None:
        return interval(list(self.shares.values())) if len(self.shares) > 1 else None

    def mean(self, of: str) -> float:
        values = [float(getattr(result, of)) for result in self.results.values()]
        return sum(values) / len(values)

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.cell.seeds)


def find(cell: Cell, plan: Sequence[Cell], store: Store) -> Finding | None:
    """None while nothing of the cell, or of the full fine-tuning that it is held against, has been run."""
    full = full_of(cell, plan).results(store)
    results = cell.results(store)
    shares = {
        seed: result.gain / (full[seed].base - full[seed].loss) for seed, result in results.items() if seed in full
    }
    return Finding(cell, cell.tuning(store).rate(), results, shares) if shares else None


def full_of(cell: Cell, plan: Sequence[Cell]) -> Cell:
    """Full fine-tuning in the same place, with all steps and the usual schedule."""
    return next(
        each
        for each in plan
        if each.choice == FULL
        and (each.model, each.domain, each.purpose) == (cell.model, cell.domain, cell.purpose)
        and (each.steps, each.schedule) == (None, "linear")
    )


@dataclass(frozen=True)
class Comparison:
    """Ours against a rival, in points of full fine-tuning's gain."""

    rival: Finding
    found: Difference
    adjusted_p: float


def compare(mine: Finding, rivals: Sequence[Finding]) -> list[Comparison]:
    """Paired differences with Holm's correction over all the rivals."""
    found = {str(i): difference(mine.shares, rival.shares) for i, rival in enumerate(rivals)}
    known = {name: each for name, each in found.items() if each is not None}
    adjusted = holm({name: each.p for name, each in known.items()})
    return [Comparison(rivals[int(name)], each, adjusted[name]) for name, each in known.items()]


def pick(choice: Choice, model: str, plan: Sequence[Cell], store: Store, domain: str = "code") -> Finding | None:
    """The finding of one choice in the main experiments."""
    for cell in plan:
        place = (cell.choice, cell.model, cell.domain, cell.steps, cell.schedule, cell.purpose)
        if place == (choice, model, domain, None, "linear", "confirm"):
            return find(cell, plan, store)
    return None


# --- the goals


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

    full = of(FULL)
    verdicts = [
        _at_least("at 10 % of the coordinates, at least 97 % of full fine-tuning's gain", model, of(ours(0.1)), 0.97),
        _memory(model, of(ours(0.1)), full),
        _at_least("at 25 %, no worse than full fine-tuning", model, of(ours(0.25)), 1.0),
        _at_least("at 1 %, at least 75 %", model, of(ours(0.01)), 0.75),
        _at_least("published factors alone, at 10 %, at least 93 %", model, of(by_factors(0.1)), 0.93),
        _rivals(model, plan, store),
    ]
    mine = of(ours(0.1))
    for name, rival in (
        ("published factors alone", of(by_factors(0.1))),
        ("the local sample alone", of(by_local(0.1))),
        ("chance", of(at_random(0.1))),
    ):
        verdicts.append(
            _not_worse(f"blended, at 10 % and {LOCAL} local sequences, never worse than {name}", model, mine, rival)
        )
    return verdicts


def _at_least(goal: str, model: str, finding: Finding | None, bound: float) -> Verdict:
    if finding is None or finding.share_interval is None:
        return Verdict(goal, model, "not run yet", "")
    low, high = finding.share_interval
    verdict = "holds" if low >= bound else "does not hold" if high < bound else "undecided"
    return Verdict(
        goal, model, verdict, f"{percent(finding.share)} [{percent(low)}, {percent(high)}], {len(finding.shares)} seeds"
    )


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


def _rivals(model: str, plan: Sequence[Cell], store: Store) -> Verdict:
    """At 10 %, against every other arm of equal parameters: ours is ahead where the two intervals do not touch."""
    goal = "at 10 %, better than every rival of equal parameters, intervals apart"
    mine = pick(ours(0.1), model, plan, store)
    cells = [
        each
        for each in plan
        if each.stage == "10 %"
        and each.model == model
        and each.choice not in (FULL, ours(0.1), library(0.1), by_factors(0.1))
    ]
    found = [finding for cell in cells if (finding := find(cell, plan, store)) is not None and len(finding.shares) > 1]
    if mine is None or mine.share_interval is None or not found:
        return Verdict(goal, model, "not run yet", "")
    ahead = [
        each for each in found if each.share_interval is not None and mine.share_interval[0] > each.share_interval[1]
    ]
    not_ahead = [name_of(each.cell.choice) for each in found if each not in ahead]
    if not_ahead:
        verdict = "does not hold" if len(found) == len(cells) else "undecided"
        return Verdict(
            goal, model, verdict, f"{len(ahead)} of {len(found)} rivals so far; not ahead of {', '.join(not_ahead)}"
        )
    verdict = "holds" if len(found) == len(cells) else "undecided"
    return Verdict(goal, model, verdict, f"ahead of all {len(found)} of {len(cells)} rivals that were run")


def _not_worse(goal: str, model: str, mine: Finding | None, rival: Finding | None) -> Verdict:
    found = None if mine is None or rival is None else difference(mine.shares, rival.shares)
    if found is None:
        return Verdict(goal, model, "not run yet", "")
    verdict = "holds" if found.low >= 0 else "does not hold" if found.high < 0 else "undecided"
    return Verdict(goal, model, verdict, f"{points(found.mean)} [{points(found.low)}, {points(found.high)}] points")


# --- the paper's claims


def judge_claims(model: str, plan: Sequence[Cell], store: Store) -> list[Verdict]:
    """What the paper says or takes for granted, one by one."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store)

    def layers(rule: str) -> Finding | None:
        return of(of_layers(rule, 0.1))

    verdicts = [
        _at_least("a tenth of the parameters gets nearly all of the gain: at least 90 %", model, of(ours(0.1)), 0.9)
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
        verdicts.append(_not_worse(claim, model, mine, rival))
    verdicts.append(_time(model, plan, store))
    return verdicts


def metered(model: str, plan: Sequence[Cell], store: Store) -> dict[Choice, Result]:
    """The runs under the meter of resources."""
    cells = [cell for cell in plan if cell.stage == "metered" and cell.model == model]
    return {cell.choice: result for cell in cells for result in cell.results(store).values()}


def _time(model: str, plan: Sequence[Cell], store: Store) -> Verdict:
    claim = "a partial update is cheaper: at 10 % more gain for the processor time"
    found = metered(model, plan, store)
    mine, full = found.get(ours(0.1)), found.get(FULL)
    if mine is None or full is None:
        return Verdict(claim, model, "not run yet", "")
    gain, time = mine.gain / full.gain, mine.cpu_seconds / full.cpu_seconds
    everything = pick(FULL, model, plan, store)
    assert everything is not None  # its rate was tuned for these runs
    times = [result.cpu_seconds for result in everything.results.values()]
    spread = (max(times) - min(times)) / everything.mean("cpu_seconds")
    verdict = "undecided" if abs(gain - time) <= spread else "holds" if gain > time else "does not hold"
    why = f"{percent(gain)} of the gain in {percent(time)} of the time, one run; times of equal work differ by"
    return Verdict(claim, model, verdict, f"{why} {percent(spread)}")


# --- words


def name_of(choice: Choice) -> str:
    """An arm in words."""
    local = f"{choice.local} local sequences"
    if choice.arm == "full":
        return "everything"
    if choice.arm == "layers":
        rules = {
            "norm": "layers by plain norm (the paper)",
            "random": "layers at random",
            "last": "last layers",
            "last_and_head": "head and last layers",
            "spectrum": "layers by Spectrum's ratio",
        }
        return rules[choice.score]
    if choice.arm == "library":
        return f"`select` of the library ({_variant(choice.published)}, {local})"
    if choice.arm != "coordinates":
        names = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA with rsLoRA", "shira": "SHiRA, random mask"}
        return names.get(choice.arm, choice.arm)
    if choice.score == "random":
        return "coordinates at random"
    sources = [f"{_variant(choice.published)}"] if choice.published else []
    sources += [local] if choice.local else []
    scores = {
        "published": "factors",
        "local_mean": "mean gradient",
        "bayes": "largest by the posterior",
        "sampled2:bayes": "drawn by the posterior",
    }
    return f"coordinates: {scores.get(choice.score, choice.score)} ({', '.join(sources)})"


def _variant(published: str) -> str:
    domain, _, percent_left = published.rstrip("*>").partition("~")
    text = f"published {domain}" + (f", {percent_left} % of it, the rest English" if percent_left else "")
    return text + (", permuted" if published.endswith("*") else "") + (", movement" if published.endswith(">") else "")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"
