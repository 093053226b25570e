"""What evidence/hypothesis.md predicted, judged line by line; its number is the hypothesis's and then the line's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import get_args

from evidence.findings import DATA, Finding, in_points, pick, product
from evidence.plan import (
    BAD_FOR_LEGAL,
    DRAWN_ANEW,
    EQUAL_MEMORY,
    OF_LEGAL,
    OLDER,
    SERIES,
    SERIES_SHARES,
    STAGES,
    Cell,
    Ranks,
    at_random,
    bridged,
    by_factors,
    by_local,
    checked,
    drawn,
    evenly,
    library,
    linear_only,
    of_layers,
    ours,
    spread,
)
from evidence.runs import Choice, Data, Store
from evidence.statistics import Difference, difference
from evidence.verdicts import (
    INFINITY,
    Verdict,
    also_alone,
    at_least,
    at_most,
    between,
    never_worse,
    on_its_side,
    within,
)

_Pick = Callable[[Choice], Finding | None]


def judge_hypotheses(model: str, plan: Sequence[Cell], store: Store) -> list[Verdict]:
    """One verdict for each thing that was said of this model."""

    def of(choice: Choice) -> Finding | None:
        return pick(choice, model, plan, store)

    in_legal = partial(pick, model=model, plan=plan, store=store, domain="legal")
    if model == SERIES:
        return [*_seventh(model, of), *_eighth(model, of, in_legal), *_ninth_of_series(model, in_legal)]
    return [
        *_first(model, of),
        *_second(model, of),
        *_third(model, of),
        *_fourth(model, of, plan, store),
        *_fifth(model, of),
        *_sixth(model, in_legal),
        *(_ninth(model, of, in_legal) if model == "smollm2" else ()),
    ]


def _first(model: str, of: _Pick) -> Iterator[Verdict]:
    """`ours` was the drawn selection then."""
    yield at_least("1.1 drawn, at 10 %: at least 97 %", model, of(drawn(0.1)), 0.97)
    yield at_least("1.1 drawn, at 1 %: at least 75 %", model, of(drawn(0.01)), 0.75)
    chance = of(at_random(0.1))
    yield within("1.2 drawn, at 10 %: within a point of chance", model, of(drawn(0.1)), chance, -0.01, 0.01)
    if model == "gpt":
        factors = of(by_factors(0.1))
        yield at_least("1.3 factors alone, at 10 %: at least 93 %", model, factors, 0.93)
        yield within("1.3 and not better than chance", model, factors, chance, -INFINITY, 0.0)
    for name, rival in (("LoRA", Choice("lora", share=0.1)), ("layers by plain norm", of_layers("norm", 0.1))):
        goal = f"1.4 {name}, at 10 %: more than 3 points behind chance"
        yield within(goal, model, of(rival), chance, -INFINITY, -0.03)
    if model == "gpt":
        yield _forgets_less("1.5 factors alone, at 10 %: less English forgotten than by chance", model, factors, chance)


def _second(model: str, of: _Pick) -> Iterator[Verdict]:
    chance = {share: of(at_random(share)) for share in (0.01, 0.1)}
    if model == "smollm2":
        yield at_least("2.1 ours, at 1 %: at least 90 %", model, of(ours(0.01)), 0.9)
        yield within("2.1 and ahead of chance", model, of(ours(0.01)), chance[0.01])
        yield within("2.1 at 10 %: within 3 points of chance", model, of(ours(0.1)), chance[0.1], -0.03, 0.03)
    for share, at_this in chance.items():
        if model == "gpt":
            goal = f"2.2 ours, at {share:.0%}: behind chance, by less than 1.5 points"
            yield within(goal, model, of(ours(share)), at_this, -0.015, 0.0)
        for name, side in (("factors", by_factors(share)), ("local sample", by_local(share))):
            goal = f"2.3 ours, at {share:.0%}: at most 1 point behind the {name} alone"
            yield within(goal, model, of(ours(share)), of(side), -0.01)
        if model == "gpt":
            goal = f"2.4 ours, at {share:.0%}: less English forgotten than by chance"
            yield _forgets_less(goal, model, of(ours(share)), at_this)


def _third(model: str, of: _Pick) -> Iterator[Verdict]:
    share = 0.1 if model == "gpt" else 0.01
    goal = f"3.1 `select` with permuted factors, at {share:.0%}: at most 2 points behind the local sample alone"
    yield within(goal, model, of(library(share, "code*")), of(by_local(share)), -0.02)
    for each in (0.01, 0.1):
        goal = f"3.2 `select`, at {each:.0%}: within a point of ours"
        goal += " (no prediction: run minutes before the text was kept)" if model == "gpt" else ""
        yield within(goal, model, of(library(each)), of(ours(each)), -0.01, 0.01)
    if model == "smollm2":
        goal = "3.3 `select` with 8 local sequences and no factors, at 1 %: ahead of chance"
        yield within(goal, model, of(library(0.01, "", 8)), of(at_random(0.01)))
    for each in (0.01, 0.1):
        for rule in get_args(Ranks):
            goal = f"3.4 LoRA with ranks by {rule}, at {each:.0%}: within 1.5 points of LoRA with one rank"
            yield within(goal, model, of(bridged(rule, each)), of(Choice("lora", share=each)), -0.015, 0.015)


def _fourth(model: str, of: _Pick, plan: Sequence[Cell], store: Store) -> Iterator[Verdict]:
    products = {data: product(model, data, plan, store) for data in get_args(Data)}
    on_few = {data: None if each is None else each.data for data, each in products.items()}
    for data in ("influence", "predicted"):
        goal = f"4.1 30 % of the data by {DATA[data]}: not ahead of any 30 % by more than 2 points"
        yield within(goal, model, on_few[data], on_few["random"], -INFINITY, 0.02)
    for data, each in products.items():
        goal = f"4.2 20 % of the parameters × 30 % of the data, {DATA[data]}: within 3 points of the product"
        both, multiplied = ({}, {}) if each is None else (each.both.shares, each.multiplied)
        yield between(goal, model, both, multiplied, (-0.03, 0.03))
    if model != "smollm2":
        return
    for published in ("english", "documentation", "legal"):
        goal = f"4.3 `select` with factors of {published}, at 1 %: at most 2 points behind the local sample alone"
        yield within(goal, model, of(library(0.01, published)), of(by_local(0.01)), -0.02)
    for local, words, bounds in ((512, "less than 1 point", (-INFINITY, 0.01)), (2, "more than 5", (0.05, INFINITY))):
        goal = f"4.4 what the right factors add to {local} local sequences, at 1 %: {words}"
        yield within(goal, model, of(ours(0.01, "code", local)), of(by_local(0.01, local)), *bounds)


def _fifth(model: str, of: _Pick) -> Iterator[Verdict]:
    mine, chance = (ours(0.01), linear_only(ours(0.01))), (at_random(0.01), linear_only(at_random(0.01)))
    if model == "gpt":
        for name, (everywhere, in_linear) in (("ours", mine), ("chance", chance)):
            goal = f"5.3 {name} in linear layers alone, at 1 %: behind {name}"
            yield within(goal, model, of(in_linear), of(everywhere), -INFINITY, 0.0)
        return
    goal = "5.1 ours in linear layers alone, at 1 %: at least 2 points ahead"
    yield within(goal, model, of(mine[1]), of(mine[0]), 0.02)
    goal = "5.1 and at 10 % not behind"
    yield within(goal, model, of(linear_only(ours(0.1))), of(ours(0.1)))
    goal = "5.4 `select` with the embedding frozen, at 1 %: within 2 points of ours in linear layers alone"
    yield within(goal, model, of(linear_only(library(0.01))), of(mine[1]), -0.02, 0.02)
    goal = "5.2 chance in linear layers alone, at 1 %: ahead of chance"
    yield within(goal, model, of(chance[1]), of(chance[0]))


def _sixth(model: str, of: _Pick) -> Iterator[Verdict]:
    """On legal text."""
    mine = {share: of(ours(share, "legal")) for share in (0.01, 0.1, 0.25)}
    in_linear = {share: of(linear_only(ours(share, "legal"))) for share in (0.01, 0.1)}
    yield within("6.1 legal text: ours, at 1 %, ahead of chance", model, mine[0.01], of(at_random(0.01)))
    if model == "gpt":
        yield at_most("6.2 legal text: ours, at 25 %, less than 97 %", model, mine[0.25], 0.97)
        goal = "6.3 legal text: ours in linear layers alone, at 1 %, behind ours"
        yield within(goal, model, in_linear[0.01], mine[0.01], -INFINITY, 0.0)
        return
    yield at_least("6.2 legal text: ours, at 25 %, at least 97 %", model, mine[0.25], 0.97)
    for share, words in ((0.01, "ahead of ours"), (0.1, "not behind ours")):
        goal = f"6.3 legal text: ours in linear layers alone, at {STAGES[share]}, {words}"
        yield within(goal, model, in_linear[share], mine[share])
    yield within("6.4 legal text: LoRA, at 1 %, ahead of ours", model, of(Choice("lora", share=0.01)), mine[0.01])


def _seventh(model: str, of: _Pick) -> Iterator[Verdict]:
    """Older checkpoints, and what is published drawn anew."""
    newest, (youngest, half) = of(by_factors(0.1)), (of(by_factors(0.1, each)) for each in OLDER)
    goal = "7.1 factors of the checkpoint after 50 %, alone, at 10 %: within a point of those of the last"
    yield within(goal, model, half, newest, -0.01, 0.01)
    goal = "7.1 of that after 10 %: more than a point behind them"
    yield within(goal, model, youngest, newest, -INFINITY, -0.01)
    published = ("code", *OLDER, *DRAWN_ANEW)
    for share in SERIES_SHARES:
        goal = f"7.2 `select`, whatever is published, at {STAGES[share]}: at most a point behind the local sample alone"
        cases = [(of(library(share, each)), of(by_local(share))) for each in published]
        yield never_worse(goal, model, cases, 0.01)
        goal = (
            f"7.3 `select` told of the staleness check, at {STAGES[share]}: at most a point behind `select` that is not"
        )
        cases = [(of(checked(share, each)), of(library(share, each))) for each in published]
        yield never_worse(goal, model, cases, 0.01)
        goal = f"7.6 `select` at temperature 2, at {STAGES[share]}: within a point of chance"
        yield within(goal, model, of(spread(share)), of(at_random(share)), -0.01, 0.01)
        goal = f"7.6 and ahead of `select`, at {STAGES[share]}"
        yield within(goal, model, of(spread(share)), of(library(share)))
    goal = "7.4 factors of a sample of each seed's own, alone, at 10 %: within half a point of those of one sample"
    yield within(goal, model, of(by_factors(0.1, "code#")), newest, -0.005, 0.005)
    goal = "7.5 factors permuted anew for each seed, alone, at 1 %: more than 3 points behind chance"
    yield within(goal, model, of(by_factors(0.01, "code*#")), of(at_random(0.01)), -INFINITY, -0.03)


def _eighth(model: str, of: _Pick, in_legal: _Pick) -> Iterator[Verdict]:
    """`select` at other budgets, at equal memory and on legal text."""
    at_a_quarter = of(spread(0.25))
    yield at_least("8.1 `select` at temperature 2, at 25 %: at least 97 %", model, at_a_quarter, 0.97)
    yield at_most("8.1 and less than all", model, at_a_quarter, 1.0)
    for share in (0.05, EQUAL_MEMORY, 0.25):
        goal = f"8.2 `select` at temperature 2, at {100 * share:g} %: within a point of chance"
        yield within(goal, model, of(spread(share)), of(at_random(share)), -0.01, 0.01)
        yield within(f"8.2 and ahead of `select`, at {100 * share:g} %", model, of(spread(share)), of(library(share)))
    lora, shira = (of(Choice(arm, share=0.1)) for arm in ("lora", "shira"))
    mine = of(library(EQUAL_MEMORY))
    for name, rival in (("LoRA", lora), ("layers by plain norm", of(of_layers("norm", 0.1)))):
        yield within(f"8.3 `select`, at equal training memory, ahead of {name}", model, mine, rival)
    goal = "8.3 `select` at temperature 2, at equal training memory, not behind SHiRA"
    yield within(goal, model, of(spread(EQUAL_MEMORY)), shira)
    for share in SERIES_SHARES:
        goal = f"8.4 legal text: 7.2 at {STAGES[share]}, with factors of legal text, of its neighbour and of code"
        cases = [(in_legal(library(share, each)), in_legal(by_local(share))) for each in OF_LEGAL]
        yield never_worse(goal, model, cases, 0.01)
    goal = "8.5 legal text: `select` at temperature 2, at 1 %: not behind chance"
    yield within(goal, model, in_legal(spread(0.01, "legal")), in_legal(at_random(0.01)))
    goal = "8.5 legal text: `select`, at 10 %: ahead of LoRA by 10 points"
    yield within(goal, model, in_legal(library(0.1, "legal")), in_legal(Choice("lora", share=0.1)), 0.1)


def _ninth(model: str, of: _Pick, in_legal: _Pick) -> Iterator[Verdict]:
    """Even fractions in `select` against those by k_star."""
    goal = "9.1 `select` with even fractions, at 1 %: behind `select` by k_star, by less than 3 points"
    yield within(goal, model, of(evenly(0.01)), of(library(0.01)), -0.03, 0.0)
    goal = "9.1 at 10 %: within a point of it"
    yield within(goal, model, of(evenly(0.1)), of(library(0.1)), -0.01, 0.01)
    for share in (0.01, 0.1):
        mine = in_legal(library(share, "legal"))
        goal = (
            f"9.2 legal text: `select` with even fractions, at {STAGES[share]}: within 2 points of `select` by k_star"
        )
        yield within(goal, model, in_legal(evenly(share, "legal")), mine, -0.02, 0.02)
        goal = f"9.2 legal text: `select` by k_star, at {STAGES[share]}: at most a point behind the local sample alone"
        yield within(goal, model, mine, in_legal(by_local(share)), -0.01)
    for domain, pick_in in (("code", of), ("legal", in_legal)):
        for share in (0.01, 0.1):
            goal = f"9, what follows, {domain}, {STAGES[share]}: even fractions at most a point behind, by the mean"
            yield _mean_not_behind(goal, model, pick_in(evenly(share, domain)), pick_in(library(share, domain)))


def _ninth_of_series(model: str, in_legal: _Pick) -> Iterator[Verdict]:
    """Legal text at equal memory, and taken apart."""
    even = in_legal(evenly(EQUAL_MEMORY, "legal"))
    rivals = {
        "`select` by k_star": library(EQUAL_MEMORY, "legal"),
        "LoRA": Choice("lora", share=0.1),
        "SHiRA": Choice("shira", share=0.1),
        "layers by plain norm": of_layers("norm", 0.1, "legal"),
    }
    for name, rival in rivals.items():
        goal = f"9.3 legal text: `select` with even fractions, at equal training memory, ahead of {name}"
        yield within(goal, model, even, in_legal(rival))
    for local, words, bounds in (
        (2, "more than 5 points", (0.05, INFINITY)),
        (512, "less than one", (-INFINITY, 0.01)),
    ):
        goal = f"9.4 legal text, 1 %: what the right factors add to {local} local sequences: {words}"
        yield within(goal, model, in_legal(ours(0.01, "legal", local)), in_legal(by_local(0.01, local)), *bounds)
    alone = in_legal(by_local(0.01))
    goal = "9.5 legal text, 1 %: ours, with any factors, at most 2 points behind the local sample alone"
    cases = [(in_legal(ours(0.01, published)), alone) for published in ("legal", *BAD_FOR_LEGAL)]
    yield never_worse(goal, model, cases, 0.02)
    goal = "9.5 and `select` with permuted factors, too"
    yield within(goal, model, in_legal(library(0.01, "legal*")), alone, -0.02)


def _mean_not_behind(goal: str, model: str, mine: Finding | None, rival: Finding | None) -> Verdict:
    """By the mean alone, as it was said that the default would be decided."""
    found = None if mine is None or rival is None else difference(mine.shares, rival.shares)
    if found is None:
        return Verdict(goal, model, "not run yet", "")
    return Verdict(goal, model, "holds" if found.mean >= -0.01 else "does not hold", in_points(found))


def _forgets_less(goal: str, model: str, mine: Finding | None, rival: Finding | None) -> Verdict:
    if mine is None or rival is None or (found := difference(mine.forgotten, rival.forgotten)) is None:
        return Verdict(goal, model, "not run yet", "")
    verdict = on_its_side(found.low, found.high, -INFINITY, 0.0)
    why = f"{_nats(found)} nats per token, each at its own rate and gain"
    mine_later, rival_later = ({seed: each.forgotten[seed] for seed in each.later} for each in (mine, rival))
    later = difference(mine_later, rival_later)
    if later is None:
        return Verdict(goal, model, verdict, why)
    verdict = also_alone(verdict, on_its_side(later.low, later.high, -INFINITY, 0.0))
    return Verdict(goal, model, verdict, f"{why}; the later seeds alone {_nats(later)}")


def _nats(found: Difference) -> str:
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
