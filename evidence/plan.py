"""What is run, in order of importance, so that a queue stopped half-way has answered the main questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from evidence.runs import Choice, Data, Purpose, Result, Run, Store
from evidence.tuning import Tuning

TUNING_SEEDS = (900,)
EXPLORING_SEEDS = (901,)
METERED_SEED = 0
SEEDS = {"gpt": range(5), "gpt-series": range(10), "smollm2": range(3), "tiny": range(2)}
DRAWS = {"gpt": range(10), "gpt-series": range(10), "smollm2": range(10), "tiny": range(2)}
"""Of full fine-tuning, of what is drawn at random, of the small model's main tables and of `JUDGED` arms."""
SIZES = {  # steps, sequences a step, tokens a sequence
    "gpt": (60, 8, 64),
    "gpt-series": (60, 8, 64),
    "smollm2": (30, 4, 64),
    "tiny": (6, 4, 32),
}
SERIES = "gpt-series"
"""The GPT whose older checkpoints are kept."""
SERIES_SHARES = (0.1, 0.01)
LOCAL = 32
LOCAL_SIZES = (2, 8, 32, 128, 512)
DRAWN = "sampled2:bayes"
"""Our first selection: the score that exploration chose, frozen before the first confirming run."""
DEFAULT = "bayes"
"""Our selection since the second hypothesis (evidence/hypothesis.md)."""
FITTED = "fitted"
"""What `select` does since the third hypothesis; its runs before that have no score's name."""
EQUAL_MEMORY = 0.075
"""Of the coordinates: with their indices they take the training memory of 10 % of the parameters in adapters."""


@dataclass(frozen=True)
class Cell:
    """One arm in one place, and the seeds that it is judged by."""

    stage: str
    model: str
    domain: str
    purpose: Purpose
    choice: Choice
    seeds: Sequence[int]
    steps: int | None = None
    """Where they are not the model's."""
    schedule: Literal["linear", "constant"] = "linear"
    data: Data = "random"

    def template(self) -> Run:
        steps, batch, length = SIZES[self.model]
        return Run(
            self.model,
            self.domain,
            self.purpose,
            self.choice,
            0.0,
            0,
            self.steps or steps,
            batch,
            length,
            self.schedule,
            self.data,
        )

    def tuning(self, store: Store) -> Tuning:
        return Tuning(store, self.template(), TUNING_SEEDS, first_step(self.model, self.domain, self.choice))

    def runs(self, store: Store) -> list[Run] | None:
        """The runs that judge it, None while its rate is not known."""
        rate = self.tuning(store).rate()
        return None if rate is None else [replace(self.template(), rate=rate, seed=seed) for seed in self.seeds]

    def results(self, store: Store) -> dict[int, Result]:
        """What is known so far, by seed."""
        found = {run.seed: store.get(run) for run in self.runs(store) or []}
        return {seed: result for seed, result in found.items() if result is not None}


def first_step(model: str, domain: str, choice: Choice) -> int:
    """Where the search for a rate begins (evidence.tuning.rate); it goes on until the best lies inside."""
    lower = 4 if model == "smollm2" else 0
    if choice.arm == "full":
        return 1 - lower
    if choice.arm not in ("coordinates", "library"):
        return 2 - lower if model != "smollm2" else _of_smollm2(domain, choice)
    spread = "random" in choice.score or "sampled" in choice.score
    if model == "smollm2" and not spread and choice.share <= 0.02:
        return -1 if choice.score == "linear+bayes" else -2
    return 3 - lower + spread + (choice.share <= 0.02) * (1 + ("random" in choice.score))


def _of_smollm2(domain: str, choice: Choice) -> int:
    """Of adapters and whole layers: near what was best for those that were run first."""
    step = {0.01: 1, 0.05: 0, 0.1: -1, 0.25: -2}[choice.share]
    if choice.arm == "layers":
        step = max(step - 2, -2)
    if choice.arm == "pissa":
        step -= 3
    return step + (domain == "legal")


def cells_of(stage: str, model: str, domain: str, plan: Sequence[Cell]) -> list[Cell]:
    """The arms of one table."""
    return [cell for cell in plan if (cell.stage, cell.model, cell.domain) == (stage, model, domain)]


def pending(cells: Sequence[Cell], store: Store) -> Iterator[Run]:
    """Runs that can be started now, in order."""
    seen = set()
    for cell in cells:
        for run in cell.tuning(store).next_runs() or cell.runs(store) or []:
            if store.get(run) is None and run.key not in seen:
                seen.add(run.key)
                yield run


# --- the arms


def ablated(model: str) -> tuple[float, ...]:
    """The shares at which the published side is taken apart."""
    return (0.1, 0.01) if model == "gpt" else (0.01,)


def ours(share: float, domain: str = "code", local: int = LOCAL) -> Choice:
    """Published factors of the domain as the prior, the local sample as the correction."""
    return Choice("coordinates", DEFAULT, share, local, domain)


def drawn(share: float, domain: str = "code", local: int = LOCAL) -> Choice:
    """What `ours` was under the first hypothesis."""
    return Choice("coordinates", DRAWN, share, local, domain)


def library(share: float, published: str = "code", local: int = LOCAL) -> Choice:
    """`select` as an adapter calls it: factors as far as the sample bears them out, fractions by k* and the norms."""
    return Choice("library", FITTED, share, local, published)


def in_bfloat16(choice: Choice) -> Choice:
    """`select` on a local sample of which half as much memory was held."""
    return replace(choice, score=f"bf16+{choice.score}")


Ranks = Literal["k_star", "share"]


def bridged(rule: Ranks, share: float) -> Choice:
    """LoRA with the ranks of `to_peft`, from a published document."""
    return Choice("bridged", rule, share, 0, "code")


def by_ranks(share: float) -> list[Choice]:
    return [bridged(rule, share) for rule in get_args(Ranks)]


def by_factors(share: float, published: str = "code") -> Choice:
    return Choice("coordinates", "published", share, 0, published)


def by_local(share: float, local: int = LOCAL) -> Choice:
    return Choice("coordinates", "local_mean", share, local)


def at_random(share: float) -> Choice:
    return Choice("coordinates", "random", share)


def linear_only(choice: Choice) -> Choice:
    """The same number of coordinates, none of them of an embedding or a vector."""
    return replace(choice, score=f"linear+{choice.score}")


def of_layers(rule: str, share: float, domain: str = "code") -> Choice:
    return Choice("layers", rule, share, 0, domain if rule == "norm" else "")


FULL = Choice("full")
JUDGED: tuple[Choice, ...] = (
    *(ours(share) for share in (0.01, EQUAL_MEMORY, 0.1, 0.25)),
    by_factors(0.1),
    by_factors(0.01),
    by_local(0.1),
    by_local(0.01),
    Choice("lora", share=0.1),
    of_layers("norm", 0.1),
    library(0.1),
    library(0.01),
)
"""What the goals and claims are judged by."""
MISLED = library(0.01, "code*")
"""`select` with what misleads most."""
LINEAR_ONLY = ("linear+bayes", "linear+random")
"""Scores of arms that leave embeddings alone."""
ADVISED = tuple(linear_only(ours(share, "legal")) for share in (0.01, 0.1))
"""What docs/adapting.md advises; on legal text the later seeds were added when three of them were known."""
STAGES = {0.01: "1 %", 0.05: "5 %", 0.1: "10 %", 0.25: "25 %"}
"""Of the main tables, by the share of the parameters."""
MAIN_STAGES = (*STAGES.values(), "equal memory")


def _cells(stage: str, model: str, domain: str, choices: Sequence[Choice]) -> list[Cell]:
    return [Cell(stage, model, domain, "confirm", each, _seeds(stage, model, domain, each)) for each in choices]


def _seeds(stage: str, model: str, domain: str, choice: Choice) -> Sequence[int]:
    drawn = choice == FULL or choice.score in ("random", "linear+random")
    judged = drawn or (domain == "code" and (model == "gpt" or choice in JUDGED or choice.score in LINEAR_ONLY))
    judged = judged or (model == "smollm2" and _with_later_seeds(domain, choice))
    judged = judged and stage in MAIN_STAGES
    judged = judged or (model == "smollm2" and stage == "ablation" and choice == MISLED)
    return (DRAWS if judged else SEEDS)[model]


def _with_later_seeds(domain: str, choice: Choice) -> bool:
    of_code = choice.share in (0.01, 0.1) and choice.score in (DRAWN, f"even+{FITTED}")
    return choice in ADVISED or choice.arm == "shira" or (domain == "code" and of_code)


def main_arms(share: float, domain: str = "code") -> list[Choice]:
    return [
        FULL,
        ours(share, domain),
        drawn(share, domain),
        at_random(share),
        by_factors(share, domain),
        by_local(share),
        Choice("lora", share=share),
        of_layers("norm", share, domain),
    ]


def neighbouring(share: float) -> list[Choice]:
    """For legal text: factors of another legal corpus."""
    return [ours(share, "debian-legal"), by_factors(share, "debian-legal")]


def rivals(share: float) -> list[Choice]:
    """The rest of the arms; the head is counted where it fits."""
    adapters = [Choice(arm, share=share) for arm in ("dora", "pissa", "shira")]
    rules = ["random", "last", "spectrum"] + (["last_and_head"] if share >= 0.25 else [])
    return adapters + [of_layers(rule, share) for rule in rules]


def all_arms(share: float) -> list[Choice]:
    """Everything that is trained in tables of this share."""
    return main_arms(share) + rivals(share) + [library(share)] + in_linear_layers(share) + by_ranks(share)


MISLEADING = ("documentation", "legal", "english", "code~25", "code*")
"""Published factors of other domains, stale ones and permuted ones."""


def posterior_of_local(share: float, local: int = LOCAL) -> Choice:
    """`ours` without anything published: the sample's own factors are the prior."""
    return Choice("coordinates", DEFAULT, share, local)


def ablation(share: float) -> list[Choice]:
    """What the published side adds, by the size of the local sample, and what a bad one costs."""
    sizes = [choice for local in LOCAL_SIZES for choice in (by_local(share, local), ours(share, "code", local))]
    return (
        sizes
        + [by_factors(share, published) for published in MISLEADING]
        + [ours(share, published, local) for published in MISLEADING for local in (8, LOCAL)]
    )


def short_ablation(share: float) -> list[Choice]:
    """The same in fewer arms, for a model of which a run takes half a minute."""
    sizes = [[by_local(share, local), ours(share, "code", local)] for local in LOCAL_SIZES if local != LOCAL]
    bad = [choice for each in MISLEADING for choice in (by_factors(share, each), ours(share, each))]
    return [choice for pair in sizes for choice in pair] + bad


def ablation_of_library(share: float) -> list[Choice]:
    """What `select` makes of little, of nothing published and of what misleads."""
    few = [library(share, "", 8), library(share, "code", 8), library(share, "", LOCAL)]
    return few + [library(share, published) for published in MISLEADING]


OLDER = ("code@0.1", "code@0.5")
"""Factors of the checkpoints after a tenth and half of the pre-training."""
DRAWN_ANEW = ("code#", "code*#")
"""A published sample, and a permutation, of its own for each seed."""


def checked(share: float, published: str = "code") -> Choice:
    """`library`, told of the verdict of a staleness check."""
    return replace(library(share, published), score=f"checked+{FITTED}")


def spread(share: float, published: str = "code") -> Choice:
    """`library` that draws coordinates in place of the largest."""
    return replace(library(share, published), score=f"spread+{FITTED}")


def evenly(share: float, published: str = "code") -> Choice:
    """`library` without k*: the same fraction of every layer."""
    return replace(library(share, published), score=f"even+{FITTED}")


def series(share: float) -> list[Choice]:
    """The seventh hypothesis: factors of older checkpoints, and what is published drawn anew for each seed."""
    arms = [FULL, at_random(share), by_local(share)]
    for published in ("code", *OLDER, *DRAWN_ANEW):
        arms += [each(share, published) for each in (by_factors, ours, library, checked)]
    return [*arms, spread(share)]


def series_at(share: float) -> list[Choice]:
    """The eighth hypothesis, on code: what is advised beside chance, the local sample and adapters of as many."""
    return [at_random(share), by_local(share), library(share), spread(share), Choice("lora", share=share)]


def series_of_equal_memory() -> list[Choice]:
    """The eighth hypothesis: coordinates with their indices."""
    return [at_random(EQUAL_MEMORY), by_local(EQUAL_MEMORY), library(EQUAL_MEMORY), spread(EQUAL_MEMORY)]


OF_LEGAL = ("legal", "debian-legal", "code")
"""Factors of legal text, of its neighbour and of another domain."""


def series_on_legal(share: float) -> list[Choice]:
    """The eighth hypothesis, on legal text: with its own factors, those of its neighbour and those of code."""
    alone = [at_random(share), by_local(share), by_factors(share, "legal"), Choice("lora", share=share)]
    informed = [library(share, published) for published in OF_LEGAL]
    afterwards = [ours(share, "legal"), posterior_of_local(share), evenly(share, "legal")]  # why `select` is behind
    return [FULL, *alone, *informed, spread(share, "legal"), *afterwards]


BAD_FOR_LEGAL = ("debian-legal", "code", "english", "legal@0.1", "legal@0.5", "legal*")
"""Factors of its neighbour, of other domains, stale ones and permuted ones."""


def ablation_on_legal(share: float) -> list[Choice]:
    """The ninth hypothesis: what the published side adds on legal text, and what a bad one costs."""
    few = [size for size in LOCAL_SIZES if size != LOCAL]
    sizes = [each for local in few for each in (by_local(share, local), ours(share, "legal", local))]
    bad = [each(share, published) for published in BAD_FOR_LEGAL for each in (by_factors, ours)]
    in_select = [library(share, published) for published in BAD_FOR_LEGAL if published not in OF_LEGAL]
    return sizes + bad + [ours(share, published, 8) for published in ("legal*", "code")] + in_select


def series_of_equal_memory_on_legal() -> list[Choice]:
    """The ninth hypothesis: both kinds of fractions, with their indices."""
    share, published = EQUAL_MEMORY, "legal"
    return [at_random(share), by_local(share), library(share, published), evenly(share, published)]


def ablation_of_drawn(share: float) -> list[Choice]:
    return [drawn(share, "code", local) for local in LOCAL_SIZES] + [
        drawn(share, published, local) for published in MISLEADING for local in (8, LOCAL)
    ]


# --- the plan


def _explored(score: str, published: str = "", local: int = 0, share: float = 0.01, model: str = "gpt") -> Cell:
    choice = Choice("coordinates", score, share, local, published)
    return Cell("explore", model, "code", "explore", choice, EXPLORING_SEEDS)


EXPLORED = [
    Cell("explore", "smollm2", "code", "explore", FULL, EXPLORING_SEEDS),
    _explored("random", share=0.1, model="smollm2"),
    _explored("sampled2:published", "code", share=0.1, model="smollm2"),
    _explored("random", model="smollm2"),
    _explored("sampled2:published", "code", model="smollm2"),
    _explored("published", "code", share=0.1, model="smollm2"),
    _explored("published", "code", model="smollm2"),
    _explored("bayes", "code", LOCAL, share=0.1, model="smollm2"),
    Cell("explore", "gpt", "code", "explore", FULL, EXPLORING_SEEDS),
    _explored("random"),
    _explored("random", share=0.1),
    _explored("published", "code", share=0.1),
    _explored("bayes", "code", LOCAL, share=0.1),
    _explored("sampled1:published", "code", share=0.1),
    _explored("sampled2:published", "code", share=0.1),
    _explored("sampled2:bayes", "code", LOCAL),
    _explored("vectors+random"),
    _explored("balanced-0.5+random", "code"),
    _explored("balanced-0.5+random", "code", share=0.1),
    _explored("balanced-1+random", "code"),
    _explored("balanced-0.5+sampled1:published", "code", share=0.1),
    _explored("balanced-0.5+sampled1:published", "code"),
    _explored("balanced-0.5+published", "code", share=0.1),
    _explored("balanced-1+random", "code", share=0.1),
    _explored("half:published", "code"),
    _explored("half:published", "code", share=0.1),
    _explored("row:local_mean", local=128),
    _explored("row:sampled1:bayes", "code", LOCAL),
    _explored("row:sampled1:local_mean", local=128),
    _explored("row:bayes", "code", 128),
    _explored("row:bayes", "code", LOCAL, share=0.1),
    _explored("row:local_mean", local=128, share=0.1),
    _explored("sampled1:published", "code"),
    _explored("published", "code"),
    _explored("local_mean", local=128),
    _explored("bayes", "code", LOCAL),
    _explored("row:bayes", "code", LOCAL),
    _explored("local_mean", local=LOCAL, share=0.1),
    _explored("column:bayes", "code", LOCAL),
    _explored("balanced0.5+random", "code"),
    _explored("sampled2:published", "code"),
    _explored("local_mean", local=LOCAL),
    _explored("even:local_mean", local=128),
    _explored("half:bayes", "code", LOCAL),
    _explored("published", "code>"),
    _explored("sampled1:local_mean", local=LOCAL),
    _explored("local_mean", local=8),
]


def _plan() -> list[Cell]:
    cells = _cells("10 %", "gpt", "code", main_arms(0.1))
    cells += _cells("10 %", "smollm2", "code", main_arms(0.1))
    cells += _cells("10 %", "gpt", "code", rivals(0.1))
    cells += _cells("25 %", "gpt", "code", main_arms(0.25))
    cells += _cells("1 %", "gpt", "code", main_arms(0.01))
    cells += _cells("1 %", "smollm2", "code", main_arms(0.01))
    cells += _cells("5 %", "gpt", "code", main_arms(0.05))
    cells += _products("gpt")
    cells += _cells("ablation", "gpt", "code", ablation(0.1))
    cells += _cells("equal memory", "gpt", "code", [ours(EQUAL_MEMORY), at_random(EQUAL_MEMORY)])
    cells += _metered("gpt")
    cells += _products("smollm2")
    cells += _cells("25 %", "smollm2", "code", main_arms(0.25))
    cells += _cells("10 %", "smollm2", "code", rivals(0.1))
    cells += _cells("equal memory", "smollm2", "code", [ours(EQUAL_MEMORY), at_random(EQUAL_MEMORY)])
    cells += _metered("smollm2")
    cells += _cells("10 %", "gpt", "legal", [*main_arms(0.1, "legal"), *neighbouring(0.1)])
    for share in (0.01, 0.05, 0.25):
        cells += _cells(STAGES[share], "gpt", "code", rivals(share))
    cells += _cells("ablation of what was drawn", "gpt", "code", ablation_of_drawn(0.1))
    cells += _cells("ablation", "gpt", "code", ablation(0.01))
    cells += _constant_rates("gpt")
    cells += _at_tenth_and_hundredth("gpt", lambda share: [library(share)])
    for share in ablated("gpt"):
        cells += _cells("ablation", "gpt", "code", [posterior_of_local(share), *ablation_of_library(share)])
    cells += _at_tenth_and_hundredth("gpt", by_ranks)
    few = [library(0.01, "code*"), library(0.01, "", 8), posterior_of_local(0.01)]
    cells += _cells("ablation", "smollm2", "code", few)
    cells += _at_tenth_and_hundredth("smollm2", lambda share: [library(share)])
    cells += _likely("smollm2", "code", 0.05) + _likely("smollm2", "legal", 0.1)
    cells += _at_tenth_and_hundredth("smollm2", by_ranks)
    for share in (0.01, 0.25):
        cells += _cells(STAGES[share], "smollm2", "code", rivals(share))
    for model in ("smollm2", "gpt"):
        cells += _at_tenth_and_hundredth(model, in_linear_layers)
    for model in ("gpt", "smollm2"):
        cells += _chosen_data(model)
    for model in ("gpt", "smollm2"):
        cells += _at_tenth_and_hundredth(model, lambda share: [in_bfloat16(library(share))])
    taken_apart = _cells("ablation", "smollm2", "code", short_ablation(0.01))
    cells += [cell for cell in taken_apart if cell.choice.local < 512]  # the largest sample takes minutes a seed
    misleading = [choice for choice in ablation_of_library(0.01) if choice not in few]
    cells += _cells("ablation", "smollm2", "code", misleading)
    for model in ("gpt", "smollm2"):
        cells += _rest_of_legal(model)
    cells += _cells("5 %", "smollm2", "code", rivals(0.05))
    cells += _constant_rates("smollm2")
    cells += [cell for cell in taken_apart if cell not in cells]
    cells += [cell for cell in _likely("smollm2", "legal", 0.25) if cell not in cells]
    for model in ("gpt", "smollm2"):
        in_linear = [linear_only(ours(share)) for share in (0.05, 0.25)]
        cells += _cells("5 %", model, "code", in_linear[:1]) + _cells("25 %", model, "code", in_linear[1:])
        cells += _cells("equal memory", model, "code", [linear_only(ours(EQUAL_MEMORY))])
    cells += _likely("smollm2", "legal", 0.05)
    for share in (0.01, 0.25, 0.05):
        cells += _cells(STAGES[share], "smollm2", "legal", rivals(share))
    for share in SERIES_SHARES:
        cells += _cells(STAGES[share], SERIES, "code", series(share))
    return cells + _more_of_series() + _ninth()


def _more_of_series() -> list[Cell]:
    rivals_of_layers = [Choice("lora", share=0.1), Choice("shira", share=0.1), of_layers("norm", 0.1)]
    cells = _cells(STAGES[0.1], SERIES, "code", rivals_of_layers)
    cells += _cells("equal memory", SERIES, "code", series_of_equal_memory())
    for share in SERIES_SHARES:
        cells += _cells(STAGES[share], SERIES, "legal", series_on_legal(share))
    for share in (0.25, 0.05):
        cells += _cells(STAGES[share], SERIES, "code", series_at(share))
    cells += _cells(STAGES[0.01], SERIES, "code", [evenly(0.01)])
    return cells


def _ninth() -> list[Cell]:
    """Fractions, and legal text taken apart."""
    cells = []
    for share in (0.01, 0.1):
        cells += _cells(STAGES[share], "smollm2", "code", [evenly(share)])
        cells += _cells(STAGES[share], "smollm2", "legal", [library(share, "legal"), evenly(share, "legal")])
    cells += _cells("equal memory", SERIES, "legal", series_of_equal_memory_on_legal())
    cells += _cells(STAGES[0.1], SERIES, "legal", [Choice("shira", share=0.1), of_layers("norm", 0.1, "legal")])
    cells += _cells(STAGES[0.01], SERIES, "legal", [Choice("shira", share=0.01)])
    return cells + _cells("ablation", SERIES, "legal", ablation_on_legal(0.01))


def _likely(model: str, domain: str, share: float) -> list[Cell]:
    """The main arms without what was drawn, which is refuted on SmolLM2."""
    choices = [each for each in main_arms(share, domain) if model == "gpt" or each.score != DRAWN]
    return _cells(STAGES[share], model, domain, choices)


def _rest_of_legal(model: str) -> list[Cell]:
    """The sixth hypothesis, and what belongs beside it."""
    cells = _likely(model, "legal", 0.01)
    for share in (0.01, 0.1, 0.25):
        cells += _cells(STAGES[share], model, "legal", [linear_only(ours(share, "legal"))])
    cells += _cells("25 %", model, "legal", [FULL, ours(0.25, "legal")])
    cells += _cells("10 %", model, "legal", rivals(0.1))
    cells += _cells("equal memory", model, "legal", [ours(EQUAL_MEMORY, "legal"), at_random(EQUAL_MEMORY)])
    if model == "gpt":
        cells += _cells("25 %", model, "legal", main_arms(0.25, "legal")[2:])
        cells += _likely(model, "legal", 0.05)
        for share in (0.01, 0.05, 0.25):
            cells += _cells(STAGES[share], model, "legal", rivals(share))
    else:
        cells += _cells("10 %", model, "legal", neighbouring(0.1))
        for share in (0.01, 0.1):
            cells += _cells(STAGES[share], model, "legal", [linear_only(at_random(share))])
    return cells


def _constant_rates(model: str) -> list[Cell]:
    """Every arm at 10 % once more, with a rate that stays where it is after its warmup."""
    return [replace(cell, schedule="constant") for cell in _cells("schedule", model, "code", all_arms(0.1))]


def _at_tenth_and_hundredth(model: str, arms: Callable[[float], Sequence[Choice]]) -> list[Cell]:
    return [cell for share in (0.1, 0.01) for cell in _cells(STAGES[share], model, "code", arms(share))]


def in_linear_layers(share: float) -> list[Choice]:
    return [linear_only(each(share)) for each in (ours, library, at_random)]


def _products(model: str) -> list[Cell]:
    few = round(0.3 * SIZES[model][0])
    return [
        replace(cell, steps=given, seeds=SEEDS[model])
        for given in (None, few)
        for cell in _cells("parameters × data", model, "code", [FULL, ours(0.2)])
    ]


def _chosen_data(model: str) -> list[Cell]:
    """The paper's 30 % of the data once more, not any but the best of the pass by each strategy."""
    few = [cell for cell in _products(model) if cell.steps is not None]
    return [replace(cell, data=data) for data in get_args(Data) if data != "random" for cell in few]


def _metered(model: str) -> list[Cell]:
    """One more run of each arm at 10 %, under the meter of resources."""
    return [Cell("metered", model, "code", "meter", choice, (METERED_SEED,)) for choice in all_arms(0.1)]


PLAN = _plan()
