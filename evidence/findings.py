"""What stored runs say about each cell of the plan: shares of full fine-tuning's gain and differences, in words too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from evidence.plan import FULL, SEEDS, Cell, cells_of, ours
from evidence.runs import Choice, Data, Published, Result, Store
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

    @property
    def later(self) -> Mapping[int, float]:
        """The shares of the seeds beyond the first ones, many of which were added when these were known."""
        return {seed: share for seed, share in self.shares.items() if seed not in SEEDS[self.cell.model]}

    @property
    def forgotten(self) -> Mapping[int, float]:
        """By seed: what the loss on English text rose by, nats per token."""
        return {seed: result.english - result.english_base for seed, result in self.results.items()}

    @property
    def selection_seconds(self) -> float:
        """Processor time of the selection: the longest, since arms of one seed share what they are made of."""
        return max(result.selection_cpu_seconds for result in self.results.values())

    def mean(self, of: str, seeds: Collection[int] | None = None) -> float:
        values = [float(getattr(result, of)) for seed, result in self.results.items() if seeds is None or seed in seeds]
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


def find_all(cells: Sequence[Cell], plan: Sequence[Cell], store: Store) -> list[Finding]:
    """Of every cell of which something is known."""
    return [found for cell in cells if (found := find(cell, plan, store)) is not None]


def full_of(cell: Cell, plan: Sequence[Cell]) -> Cell:
    """Full fine-tuning in the same place, with all steps and the usual schedule."""
    return next(
        each
        for each in plan
        if each.choice == FULL
        and (each.model, each.domain, each.purpose) == (cell.model, cell.domain, cell.purpose)
        and (each.steps, each.schedule) == (None, "linear")
    )


def at_constant_rate(model: str, plan: Sequence[Cell], store: Store) -> dict[Choice, Finding]:
    """Arms at 10 % of code with a rate that stays constant, in shares of what full fine-tuning gained with one."""
    found = {each.cell.choice: each for each in find_all(cells_of("schedule", model, "code", plan), plan, store)}
    of_full = found[FULL].shares if FULL in found else {}
    shares = {
        choice: {seed: share / of_full[seed] for seed, share in each.shares.items() if seed in of_full}
        for choice, each in found.items()
    }
    return {choice: replace(found[choice], shares=known) for choice, known in shares.items() if known}


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


@dataclass(frozen=True)
class Product:
    """Fewer parameters, fewer data and both, in shares of what full fine-tuning gained with all data."""

    parameters: Finding
    data: Finding
    both: Finding

    @property
    def multiplied(self) -> dict[int, float]:
        """By seed: what both would keep if each kept its share of the other's."""
        return {seed: self.parameters.shares[seed] * self.data.shares[seed] for seed in self._seeds}

    @property
    def added(self) -> dict[int, float]:
        """By seed: what both would keep if both lost what each loses."""
        return {seed: self.parameters.shares[seed] + self.data.shares[seed] - 1 for seed in self._seeds}

    @property
    def _seeds(self) -> list[int]:
        return sorted(self.parameters.shares.keys() & self.data.shares.keys())


def product(model: str, data: Data, plan: Sequence[Cell], store: Store) -> Product | None:
    """20 % of the parameters × 30 % of the data that are chosen like this; None before all of it has been run."""
    places: tuple[tuple[Choice, bool, Data], ...] = (
        (ours(0.2), False, "random"),
        (FULL, True, data),
        (ours(0.2), True, data),
    )
    cells = {
        (cell.choice, cell.steps is not None, cell.data): cell
        for cell in cells_of("parameters × data", model, "code", plan)
    }
    parts = find_all([cells[place] for place in places if place in cells], plan, store)
    return Product(*parts) if len(parts) == len(places) else None


def equal_memory(model: str, plan: Sequence[Cell], domain: str = "code") -> list[Cell]:
    """Coordinates with fewer parameters, and what has no indices to keep with 10 % of them."""
    return [
        cell
        for cell in plan
        if (cell.model, cell.domain) == (model, domain)
        and (
            cell.stage == "equal memory"
            or (cell.stage == "10 %" and (cell.choice == FULL or cell.choice.arm not in ("coordinates", "library")))
        )
    ]


def metered(model: str, plan: Sequence[Cell], store: Store) -> dict[Choice, Result]:
    """The runs under the meter of resources."""
    cells = cells_of("metered", model, "code", plan)
    return {cell.choice: result for cell in cells for result in cell.results(store).values()}


# --- words

DATA: dict[Data, str] = {
    "random": "any",
    "predicted": "predicted J (Algorithm 2)",
    "influence": "exact J",
    "similar": "gradient similarity",
}
"""Names of the ways to choose sequences."""


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
        rules = {
            "linear": ", the embedding frozen",
            "bf16": ", the sample in bfloat16",
            "checked": ", told by a staleness check",
            "spread": ", drawn at temperature 2",
            "even": ", every layer alike",
        }
        how = "".join(rules[rule] for rule in choice.score.split("+")[:-1])
        published = f"{variant(choice.published)}, " if choice.published else ""
        return f"`select` of the library ({published}{local}{how})"
    if choice.arm == "bridged":
        return f"LoRA, ranks of `to_peft` by {'k*' if choice.score == 'k_star' else 'share of the norm'}"
    if choice.arm != "coordinates":
        names = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA with rsLoRA", "shira": "SHiRA, random mask"}
        return names.get(choice.arm, choice.arm)
    *dealt, score = choice.score.split("+")
    where = " of linear layers" if dealt == ["linear"] else ""
    if score == "random" and (where or not dealt):
        return f"coordinates{where} at random"
    sources = [f"{variant(choice.published)}"] if choice.published else []
    sources += [local] if choice.local else []
    scores = {
        "published": "factors",
        "local_mean": "mean gradient",
        "bayes": "largest by the posterior",
        "sampled2:bayes": "drawn by the posterior",
    }
    words = scores.get(score if where else choice.score, choice.score)
    return f"coordinates{where}: {words} ({', '.join(sources)})"


def variant(published: str) -> str:
    """What is published, in words."""
    parsed = Published.parse(published)
    text = f"published {parsed.domain}" + (
        f", {parsed.percent} % of it, the rest English" if parsed.percent < 100 else ""
    )
    text += f", after {parsed.fraction:.0%} of the pre-training" if parsed.fraction < 1 else ""
    text += (", permuted" if parsed.permuted else "") + (", movement" if parsed.moved else "")
    return text + (", anew for each seed" if parsed.by_seed else "")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def in_points(found: Difference) -> str:
    """A difference with its interval."""
    return f"{points(found.mean)} [{points(found.low)}, {points(found.high)}]"
