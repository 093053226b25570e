"""docs/evidence.md, from the stored runs alone; equal runs give equal bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product as product_of
from pathlib import Path
from typing import get_args

from scipy import stats

from evidence.arms import PUBLISHED_SEQUENCES
from evidence.findings import (
    DATA,
    Finding,
    at_constant_rate,
    compare,
    equal_memory,
    find,
    find_all,
    in_points,
    metered,
    name_of,
    percent,
    pick,
    product,
)
from evidence.gradients import PUBLISHED_BATCH
from evidence.hypotheses import judge_hypotheses
from evidence.overview import overview
from evidence.plan import (
    DEFAULT,
    DRAWN,
    DRAWS,
    EQUAL_MEMORY,
    EXPLORED,
    FULL,
    LOCAL,
    PLAN,
    SEEDS,
    SERIES,
    SIZES,
    STAGES,
    TUNING_SEEDS,
    Cell,
    at_random,
    by_local,
    cells_of,
    ours,
)
from evidence.runs import Choice, Data, Store
from evidence.statistics import difference
from evidence.tables import table, with_interval
from evidence.training import JUDGED
from evidence.verdicts import Verdict, judge, judge_claims

DOCUMENT = Path(__file__).parent.parent / "docs" / "evidence.md"
HYPOTHESIS = Path(__file__).parent / "hypothesis.md"
MODELS = {
    "gpt": "a GPT of 2.0 M parameters (8 layers, width 128, tied head), pre-trained here on English",
    "smollm2": "SmolLM2-135M (weights dequantised from 4 bits)",
}
OFTEN = {
    "gpt": "the arms at 1, 5, 7.5, 10 and 25 % on code, of full fine-tuning and what is drawn at random on legal text",
    "smollm2": "full fine-tuning, what is drawn at random, SHiRA, on code `select` and most arms that are judged\n"
    "  and, on legal text, ours in linear layers alone at 1 and 10 %",
}
DOMAINS = {"code": "code", "legal": "legal text"}
OPENING = """# Evidence: what a selection is worth

Written by `python -m evidence report` from `evidence/runs/*.jsonl`; do not edit. `make evidence` runs what is missing,
and can be stopped and continued at any time."""
IN_SHORT = f"""What the main arms have of full fine-tuning's gain on held-out text, with 95 % intervals, by domain and
share of the parameters that is trained; `{SERIES}` is a second GPT of the same recipe. Every arm has its own tuned
rate, and 3 to 10 paired seeds, as the tables below tell. What to make of it stands in docs/adapting.md, "Whether to
use it"; how to read it below, under "Setting"."""
SETTING = f"""- Domains: code (the standard library) and legal text (licences of packages) to adapt to;
  READMEs of packages and Debian's licences as their neighbours. Documents are dealt to training, local sample,
  published sample, development and held-out text, which share none. Every loss below is on held-out text unless said.
- Every table names its texts by a digest. SmolLM2's legal text is of the packages that `evidence/texts.py` names, in
  the versions of constraints.txt. The GPT's, and the READMEs and licences of factors on code (of SmolLM2 all but those
  of `select`), were of all packages that were installed then, of which no list was kept: those runs cannot be repeated
  to the digit. SmolLM2's runs on legal text were computed with AMX, all others without, which rounds otherwise: runs of
  one model and domain begin with the same losses, and others are refused. They need not end alike: some of SmolLM2's
  on code were made on a processor with AMX that was kept from using it. There `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
  python -m evidence repeat --model smollm2 --count 8` made six of those on code again: one that came from it gave the
  same loss, five from another gave losses up to 0.0028 nats away, 1.2 % of what that arm gained. It is as if the seed's
  draw were a little another one, and widens the differences of pairs that are of both.
- Published factors are of {PUBLISHED_SEQUENCES["gpt"]} sequences for the GPT and of
  {PUBLISHED_SEQUENCES["smollm2"]} for SmolLM2: a local sample of 128 or 512 knows more than what is published for it.
  Those of "25 % of it" stand for a blueprint gone stale: profiled at the same weights, on text of which three
  quarters are English. Of permutations of factors there is one, and one published sample, for all seeds; older
  checkpoints, and samples and permutations of each seed's own, are on `{SERIES}`, in a section below.
- AdamW without decay or clipping, float32 weights under bfloat16 autocast, warmup over a tenth, then linearly to zero,
  for every arm alike. Each arm's rate is tuned on the development text (seed {TUNING_SEEDS[0]}) over powers of two,
  extended until the best is inside the grid.
- A seed decides the training batches, the local sample, and what is random. Layers are single tensors, which come
  near a budget and seldom meet it; of layers at random a draw that holds the embedding is of another kind than one
  without. Adapters sit on every linear layer, with the rank, at least 1, whose parameters come nearest. The tables give
  what was trained and its part of the budget. No arm trains on the local sample: those that choose nothing by it have
  seen less of the domain.
- Intervals are 95 %: studentised bootstraps over ten paired seeds, Student's t over fewer, of which a bootstrap knows
  too few resamples. They are of training and selection, given the held-out text and a rate tuned with one seed. p is by
  exact sign flips with Holm's correction over the table; with 10 seeds no p can be below 0.002, with 5 below 0.06 and
  with 3 below 0.25, before the correction. Verdicts, and the tables of the ablation, are by intervals, uncorrected: of
  many that look at several cases one may fail by chance. A verdict that the later seeds alone do not bear out says so;
  those of rivals and of several cases are of all seeds. Later seeds are those from {len(SEEDS["gpt"])} (GPT) and
  {len(SEEDS["smollm2"])} (SmolLM2) on.
- Where arms of a table have different numbers of seeds, `loss`, `English` and `CPU s` are over those that all finished
  arms have, and left out where an arm lacks one of these; `gain` is over an arm's own, and so its interval tells of
  their number too; differences are over common seeds.
- Legal text: only exact duplicates are kept together when documents are dealt. Licences resemble each other, so that
  held-out ones share passages with those trained on: read that table as adaptation to a narrow domain.
- Memory is that of training, without weights and activations, and measured: moments, indices and the gradients held at
  a step; after the plus, one whole gradient of the largest tensor, which a partial update sees for a moment; of the
  embedding, which is tied, three exist then, those of its two uses and their sum (none where linear layers alone are
  trained). SHiRA's indices, 8 bytes a weight in peft, are not in it; nor what is held before training: of a local
  sample 4 bytes a coordinate in float32, 2 in bfloat16, and then up to 12 of each of the tensor that is being ranked.
  CPU seconds are of the training loop on one thread of a shared machine; `selection` is what the choice takes before
  it, the longest of the arm's runs; the profiles of `select`, which runs share, may be in it or not. Runs of one table
  may be days and processors apart: seconds that differ by less than a factor of two tell nothing."""
EXPLORED_WORDS = f"""On the development text and seeds that are used nowhere else, each at its own tuned rate, code.
An arm without a loss at the other seed was dropped, or frozen, by that of the tuning seed. From this the first default
(`{DRAWN}`) was frozen; nothing here confirms anything."""
METERED_WORDS = """One more run of each arm at 10 %, seed 0, under the meter of resources (docs/resources.md). ΔΨ is
what the held-out loss fell by, nats per token; Γ is processor time of training and of the selection before it, so
ΔΨ/ΔΓ is nats per processor minute. FLOPs are by formula, of training. Wall time is of the
training loop, on a machine that does other things too. Memory is in the tables above; the peak of a whole process is
not given, since the runs share processes. This machine tells no energy."""
CLAIMS_WORDS = (
    """Code, the arms above. A claim holds when the whole interval is on its side, and fails when none of it is."""
)
SCHEDULE_WORDS = """Whether the schedule favours an arm: each arm at 10 % was tuned once more with a rate that stays
constant after its warmup, on the same development text and seed. Every verdict but one keeps the linear schedule that
was written down before. `gain` is of what full fine-tuning gained with the same schedule, on held-out text."""
PRODUCT_WORDS = f"""The paper's 20 % of the parameters (ours) × 30 % of the data: fewer steps, over any sequences of the
pass or over the best of it by a strategy; {LOCAL} local sequences are the sample of Algorithm 2 and the target of the
similarity. Each cell has its own rate. Shares of what full fine-tuning gains with the whole pass. `scoring` is the
processor time that a strategy takes for the pass and its sample, the longest of the runs of everything. The pass is of
one domain; a pool with other text and noise in it is in docs/data-selection.md."""
SERIES_WORDS = f"""On `{SERIES}`: the recipe of the first GPT run once more, with the checkpoints after 10 and 50 % of
its pre-training kept; steps and texts as there, legal text as for SmolLM2; ten paired seeds of every arm, each
difference within a seed. Published factors are of the last checkpoint's gradients, of an older one's (same text), of a
sample of each seed's own, or permuted anew for each seed. `select` is told, or not, what the registry's staleness check
answers to the gradient norms of the {LOCAL} local sequences in batches of {PUBLISHED_BATCH}: `verdicts` counts the
answers over the seeds. Differences are in points of full fine-tuning's gain, paired, uncorrected."""
BEYOND = """Asked for and not in the plan: equal memory at other budgets than 10 %, and on legal text that of ours in
linear layers alone; head and last layers below 25 %, where the head does not fit; on the first GPT and on SmolLM2
`select` of the library at 5 and 25 % and at equal memory, on the first on legal text too; on SmolLM2 older
checkpoints, more than one permutation of factors and one published sample, and more than 3 seeds of DoRA, PiSSA, of
`to_peft` and of what is compared on legal text; on the first GPT more than 5 of SHiRA, the adapters and what was
drawn by the posterior on legal text, and of most of the ablation; the ablation of SmolLM2 on legal text and at 10 %,
and misleading factors with other than 32 local sequences; parameters × data, the schedule and the meter on legal
text. Larger models, longer training and a GPU were not at hand."""


def render(store: Store, plots: Sequence[str], plan: Sequence[Cell] = PLAN, explored: Sequence[Cell] = EXPLORED) -> str:
    """The whole document."""
    goals = [verdict for model in MODELS for verdict in judge(model, plan, store)]
    predictions = [verdict for model in (*MODELS, SERIES) for verdict in judge_hypotheses(model, plan, store)]
    claims = [verdict for model in MODELS for verdict in judge_claims(model, plan, store)]
    verdicts = {"goals": goals, "predictions": predictions, "claims of the paper": claims}
    parts = [
        OPENING,
        "## In short",
        IN_SHORT,
        *overview((*MODELS, SERIES), verdicts, plan, store),
        HYPOTHESIS.read_text().strip(),
        "## Verdicts",
        _verdicts("Goal", goals),
        "Of what was predicted (numbers: hypothesis, line):",
        _verdicts("Prediction", predictions),
        _images([name for name in plots if name.startswith(("arms", "budgets"))]),
        "## Setting",
        _setting(),
        *_stages(plan, store),
        "## The schedule",
        SCHEDULE_WORDS,
        *_schedules(plan, store),
        "## What the published side adds",
        *_ablations(plan, store),
        _images([name for name in plots if name.startswith("local")]),
        "## A second GPT: older checkpoints, samples drawn anew, more budgets",
        SERIES_WORDS,
        *_series(plan, store),
        "## Parameters × data",
        PRODUCT_WORDS,
        *_products(plan, store),
        "## At equal training memory",
        *_equal_memory(plan, store),
        "## What it cost",
        METERED_WORDS,
        *_metered(plan, store),
        "## What of the paper held",
        CLAIMS_WORDS,
        _verdicts("Claim", claims),
        "## Exploration",
        EXPLORED_WORDS,
        _exploration(explored, store),
        "## Not run yet",
        _missing(plan, store),
        BEYOND,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting() -> str:
    lines = []
    for model, words in MODELS.items():
        steps, batch, length = SIZES[model]
        seeds, draws = len(SEEDS[model]), len(DRAWS[model])
        lines.append(
            f"- `{model}`: {words};\n  {steps} steps of {batch} × {length} tokens;\n"
            f"  {draws} paired seeds of {OFTEN[model]}, {seeds} elsewhere;\n"
            f"  judged on {JUDGED[model] * 8 * length:,} tokens of held-out text, the same for every seed."
        )
    return "\n".join([*lines, SETTING])


def _verdicts(of: str, verdicts: Sequence[Verdict]) -> str:
    rows = [[each.goal, f"`{each.model}`", each.verdict, each.why] for each in verdicts]
    return table([of, "Model", "Verdict", "Measured"], rows)


def _stages(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    places = {
        (cell.stage, cell.model, cell.domain) for cell in plan if cell.stage in STAGES.values() and cell.model in MODELS
    }
    for stage, model, domain in sorted(
        places, key=lambda place: (list(MODELS).index(place[1]), place[2], list(STAGES.values()).index(place[0]))
    ):
        found = find_all(cells_of(stage, model, domain, plan), plan, store)
        if found:
            yield f"## {model}: {stage} of the parameters, {DOMAINS[domain]}"
            yield _arms(found, plan, store)


def _arms(found: list[Finding], plan: Sequence[Cell], store: Store) -> str:
    full = next((each for each in found if each.cell.choice == FULL), None)
    mine = next((each for each in found if each.cell.choice.score == DEFAULT), None)
    rivals = [each for each in found if mine is not None and each is not mine]
    against = {id(each.rival): each for each in (compare(mine, rivals) if mine else [])}
    finished = [each for each in found if each.complete] or found
    common = set.intersection(*(set(each.shares) for each in finished))
    rows = []
    for each in sorted(found, key=lambda finding: -finding.share):
        compared = against.get(id(each))
        has_common = common <= each.shares.keys()
        rows.append(
            [
                f"**{name_of(each.cell.choice)}**" if each is mine else name_of(each.cell.choice),
                _trained(each),
                f"{each.rate:g}",
                str(len(each.shares)) + ("" if each.complete else f" of {len(each.cell.seeds)}"),
                f"{each.mean('loss', common):.3f}" if has_common else "",
                _gain(each),
                "" if compared is None else f"{in_points(compared.found)}, {compared.adjusted_p:.2f}",
                f"{each.mean('english', common) - each.mean('english_base', common):+.2f}" if has_common else "",
                _memory(each, full),
                f"{each.mean('cpu_seconds', common):.1f}" if has_common else "",
                f"{each.selection_seconds:.1f}",
            ]
        )
    head = [
        "Trained",
        "parameters (of the budget)",
        "rate",
        "seeds",
        "loss",
        "gain, % of full's",
        "ours ahead by, points; p",
        "English",
        "memory",
        "CPU s",
        "selection",
    ]
    base = found[0].mean("base")
    read = sorted({result.texts for each in found for result in each.results.values()})
    return (
        f"Loss before: {base:.3f}. Common seeds: {len(common)}. Texts: {', '.join(f'`{each}`' for each in read)}.\n\n"
        + table(head, rows)
    )


def _trained(each: Finding) -> str:
    trained, budget = each.mean("trained"), each.cell.choice.share * each.mean("parameters")
    return f"{trained:,.0f}" + ("" if each.cell.choice == FULL else f" ({trained / budget:.0%})")


def _memory(each: Finding, full: Finding | None) -> str:
    held, moment = each.mean("training_bytes") / 1e6, each.mean("largest_gradient_bytes") / 1e6
    share = "" if full is None else f" ({percent(each.mean('training_bytes') / full.mean('training_bytes'))})"
    return f"{held:.2f} MB{share}" + (f" + {moment:.2f}" if moment else "")


def _schedules(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for model in MODELS:
        rows = []
        gains = []
        for choice, constant in at_constant_rate(model, plan, store).items():
            linear = pick(choice, model, plan, store)
            if linear is None:
                continue
            losses = [_tuning_loss(each.cell, store) for each in (linear, constant)]
            gains.append((linear.share, constant.share))
            rows.append(
                [
                    name_of(choice),
                    f"{linear.rate:g}",
                    f"{constant.rate:g}",
                    *(f"{loss:.3f}" for loss in losses),
                    "constant" if losses[1] < losses[0] else "linear",
                    _gain(linear),
                    _gain(constant),
                ]
            )
        rates, losses_of = ["rate, linear", "constant"], ["development loss, linear", "constant"]
        head = ["Trained", *rates, *losses_of, "chosen", "gain, linear", "constant"]
        yield f"`{model}`:"
        yield table(head, rows)
        if len(gains) > 2:
            chosen = sum(row[5] == "constant" for row in rows)
            yield (
                f"{chosen} of {len(rows)} arms choose the constant rate. Of the arms' gains under one schedule and the "
                f"other the rank correlation is {stats.spearmanr(*zip(*gains, strict=True)).statistic:.2f}."
            )


def _gain(each: Finding) -> str:
    return with_interval(list(each.shares.values()))


def _ablations(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for model in MODELS:
        for share in dict.fromkeys(
            cell.choice.share for cell in plan if cell.stage == "ablation" and cell.model == model
        ):
            yield f"`{model}`, {share:.0%} of the coordinates; `gain` is the share of full fine-tuning's gain:"
            yield _ablation(model, share, plan, store)


def _ablation(model: str, share: float, plan: Sequence[Cell], store: Store) -> str:
    choices = dict.fromkeys(
        cell.choice for cell in plan if (cell.model, cell.domain, cell.choice.share) == (model, "code", share)
    )
    mine = pick(ours(share), model, plan, store)
    rows = []
    for choice in sorted(choices, key=_by_source):
        each = pick(choice, model, plan, store) if choice.arm in ("coordinates", "library") else None
        if each is None:
            continue
        compared = None if mine is None or each.cell.choice == mine.cell.choice else compare(mine, [each])
        rows.append(
            [
                name_of(choice),
                f"{each.rate:g}",
                str(len(each.shares)),
                _gain(each),
                in_points(compared[0].found) if compared else "",
            ]
        )
    return table(["Chosen by", "rate", "seeds", "gain", f"ours (right factors, {LOCAL} local) ahead by, points"], rows)


def _series(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for stage, domain in dict.fromkeys((cell.stage, cell.domain) for cell in plan if cell.model == SERIES):
        cells = equal_memory(SERIES, plan, domain) if stage == "equal memory" else cells_of(stage, SERIES, domain, plan)
        found, full = find_all(cells, plan, store), pick(FULL, SERIES, plan, store, domain)
        share = next((each.cell.choice.share for each in found if each.cell.choice.arm == "coordinates"), 0.0)
        sides = [
            {} if each is None else each.shares
            for each in (pick(choice, SERIES, plan, store, domain) for choice in (at_random(share), by_local(share)))
        ]
        rows = [
            [
                name_of(each.cell.choice),
                f"{each.rate:g}",
                str(len(each.shares)),
                _gain(each),
                *(_between(each.shares, side) if each.shares != side else "" for side in sides),
                _memory(each, full),
                _verdicts_of(each),
            ]
            for each in sorted(found, key=lambda each: _by_source(each.cell.choice))
            if each.cell.choice != FULL
        ]
        beside = " and, at equal training memory, 10 % of the parameters" if stage == "equal memory" else ""
        beside += ", taken apart" if stage == "ablation" else ""
        yield f"{100 * share:g} % of the coordinates{beside}, {DOMAINS[domain]}:"
        compared = ["gain, % of full's", "ahead of chance", "of the local sample alone"]
        head = ["Trained", "rate", "seeds", *compared, "memory", "verdicts"]
        yield table(head, rows)


def _verdicts_of(each: Finding) -> str:
    counts = Counter(result.verdict for result in each.results.values() if result.verdict)
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


def _by_source(choice: Choice) -> tuple[str, str, str, int]:
    return choice.arm, choice.score, choice.published, choice.local


def _products(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for model in MODELS:
        any_data = product(model, "random", plan, store)
        if any_data is None:
            yield f"`{model}`: not run yet."
            continue
        yield f"`{model}`: 20 % of the parameters and all data keep {_gain(any_data.parameters)}."
        rows = []
        apart, refuted = 0.0, dict.fromkeys(("multiplied", "added"), 0)
        for data in get_args(Data):
            found = product(model, data, plan, store)
            if found is None:
                continue
            apart = max(apart, *(abs(found.multiplied[seed] - found.added[seed]) for seed in found.added))
            for name in refuted:
                off = difference(found.both.shares, getattr(found, name))
                refuted[name] += off is not None and not off.low <= 0 <= off.high
            rows.append(
                [
                    DATA[data],
                    _gain(found.data),
                    "" if data == "random" else _between(found.data.shares, any_data.data.shares),
                    _gain(found.both),
                    _between(found.both.shares, found.multiplied),
                    _between(found.both.shares, found.added),
                    "" if data == "random" else f"{found.data.selection_seconds:.1f}",
                    f"{found.data.mean('cpu_seconds'):.1f}",
                ]
            )
        yield table(
            [
                "30 % of the data",
                "everything trained on it",
                "ahead of any",
                "20 % of the parameters on it",
                "ahead of the product",
                "of the sum of the losses",
                "scoring, s",
                "training, s",
            ],
            rows,
        )
        yield (
            f"What the product and the sum of the losses predict lies at most {100 * apart:.1f} points apart, so these "
            f"runs hardly tell them from each other: intervals exclude the product in {refuted['multiplied']} of "
            f"{len(rows)} rows and the sum in {refuted['added']}."
        )


def _between(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    found = difference(first, second)
    return "?" if found is None else in_points(found)


def _equal_memory(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for model, domain in product_of(MODELS, DOMAINS):
        cells = equal_memory(model, plan, domain)
        found = find_all(cells, plan, store)
        yield (
            f"{model}, {DOMAINS[domain]}: adapters and layers with 10 % of the parameters, coordinates with "
            f"{percent(EQUAL_MEMORY)} of them, whose indices take the rest."
        )
        yield _arms(found, plan, store) if any(each.cell.stage == "equal memory" for each in found) else "Not run yet."


def _metered(plan: Sequence[Cell], store: Store) -> Iterable[str]:
    for model in MODELS:
        found = metered(model, plan, store)
        full = found.get(FULL)
        yield f"`{model}`:"
        if full is None or full.spent is None:
            yield "Not run yet."
            continue
        per_full = full.gain / (60 * full.spent["processor_hours"])
        rows = []
        selections = {choice: pick(choice, model, plan, store) for choice in found}
        for choice, result in found.items():
            spent, selected = result.spent or {}, selections[choice]
            assert selected is not None  # its rate was tuned for these runs
            seconds = 3600 * spent["processor_hours"]
            minutes = (seconds + selected.selection_seconds) / 60
            rows.append(
                [
                    name_of(choice),
                    f"{result.gain:.3f}",
                    f"{seconds:.1f}",
                    f"{result.seconds:.1f}",
                    f"{selected.selection_seconds:.1f}",
                    f"{spent['flops'] / 1e12:.2f}" if "flops" in spent else "not read",
                    f"{result.gain / minutes:.2f} ({result.gain / minutes / per_full:.2f})",
                ]
            )
        head = ["Trained", "ΔΨ", "processor s", "wall s", "selection", "TFLOP", "ΔΨ/ΔΓ (÷ full's)"]
        yield table(head, rows)


def _exploration(explored: Sequence[Cell], store: Store) -> str:
    rows = []
    for cell in explored:
        rate, each = cell.tuning(store).rate(), find(cell, explored, store)
        if rate is None:
            continue
        rows.append(
            [
                f"`{cell.model}`",
                f"{cell.choice.share:.0%}",
                name_of(cell.choice),
                f"{rate:g}",
                f"{_tuning_loss(cell, store):.3f}",
                "" if each is None else f"{each.mean('loss'):.3f}",
                "" if each is None else percent(each.share),
            ]
        )
    rows.sort(key=lambda row: (row[0], row[1], float(row[4])))
    return table(["model", "share", "chosen by", "rate", "loss, tuning seed", "loss, other seed", "gain"], rows)


def _tuning_loss(cell: Cell, store: Store) -> float:
    return min(cell.tuning(store).losses().values())


def _missing(plan: Sequence[Cell], store: Store) -> str:
    rows = []
    for cell in plan:
        done = len(cell.results(store))
        if done < len(cell.seeds):
            steps = "" if cell.steps is None else f", {cell.steps} steps"
            schedule = "" if cell.schedule == "linear" else f", {cell.schedule} rate"
            data = "" if cell.data == "random" else f", data by {DATA[cell.data]}"
            where = f"{cell.model}, {cell.stage}, {cell.domain}{steps}{schedule}{data}"
            rows.append(
                f"- {where}: {name_of(cell.choice)} ({cell.choice.share:.0%}): {done} of {len(cell.seeds)} seeds"
            )
    return "\n".join(rows) if rows else "Nothing: every cell of the plan has been run."


def _images(names: Sequence[str]) -> str:
    return "\n".join(f"![{name.removesuffix('.svg')}](evidence/{name})" for name in names)
