"""From a choice to a model and the optimizer that trains what was chosen."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from evidence import allocation, layers, scores
from evidence.gradients import (
    Factors,
    Moments,
    local_moments,
    local_sample,
    profile,
    published_factors,
    published_profile,
)
from evidence.models import Subject
from evidence.runs import Choice, Run
from evidence.staleness import check_staleness
from gradient_blueprints.training.bridges.adapters import to_peft
from gradient_blueprints.training.finetuning import SelectedAdamW, SelectedParameter, apply_selection
from gradient_blueprints.training.selection import Budget, LocalStatistics, Selection, select

PUBLISHED_SEQUENCES = {"gpt": 512, "gpt-series": 512, "smollm2": 64, "tiny": 16}
TEMPERATURE = 2.0
ADAPTERS = ("lora", "dora", "pissa", "shira")


@dataclass(frozen=True)
class Arm:
    """A model ready to be trained."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    trained: int
    verdict: str = ""
    """Of the staleness check that the selection was told of."""


def build(subject: Subject, run: Run, autocast: bool) -> Arm:
    """The arm of a run, its selection made; random parts are drawn by the run's seed."""
    torch.manual_seed(run.seed)
    choice, model = run.choice, subject.fresh()
    if choice.arm == "full":
        return Arm(model, _adamw(model, run.rate), sum(each.numel() for each in model.parameters()))
    if choice.arm in ADAPTERS:
        return _adapter(model, run)
    if choice.arm == "bridged":
        return _bridged(model, subject, run)
    if choice.arm == "library":
        selection, verdict = _of_the_library(model, subject, run)
        return replace(_partial(model, apply_selection(model, selection), run.rate), verdict=verdict)
    published = _published(subject, run)
    if choice.arm == "layers":
        selected = _layers(model, layers.choose(model, choice.score, choice.share, published, run.seed))
    else:
        local = _local(subject, run, autocast)
        selected = coordinates(model, choice, scores.Knowledge(run.seed, local, published))
    return _partial(model, selected, run.rate)


def _partial(model: PreTrainedModel, selected: list[SelectedParameter], rate: float) -> Arm:
    return Arm(model, SelectedAdamW(selected, lr=rate, weight_decay=0.0), sum(entry.selected for entry in selected))


def _of_the_library(model: PreTrainedModel, subject: Subject, run: Run) -> tuple[Selection, str]:
    """`select` with its defaults, on what an adapter has: a published document and its factors, and a local sample.

    With nothing published the document is the sample's own. With the rule `linear` the embedding is frozen first, with
    `bf16` the sample's mean gradient is kept in bfloat16, with `checked` the published document is held against the
    sample as the registry does, and the selection told; the verdict is answered too. With `spread` coordinates are
    drawn at the temperature that docs/adapting.md advises. With `even` every layer gets the same fraction.
    """
    choice = run.choice
    batches = local_sample(subject, run.domain, choice.local, run.length, run.seed)
    local, _ = profile(subject, batches, run.domain)
    blueprint, factors = (
        published_profile(subject, choice.published, PUBLISHED_SEQUENCES[subject.name], run.length, run.seed)
        if choice.published
        else (local, {})
    )
    budget: float | Budget = choice.share
    rules = choice.score.split("+")[:-1]
    if "linear" in rules:
        budget = Budget.parameters(int(choice.share * sum(each.numel() for each in model.parameters())))
        model.get_input_embeddings().requires_grad_(False)
    dtype = torch.bfloat16 if "bf16" in rules else torch.float32
    statistics = LocalStatistics.gather(model, batches, dtype=dtype)
    spread = "spread" in rules
    checked = check_staleness(subject, blueprint, batches, run.domain) if "checked" in rules else None
    selection = select(
        blueprint,
        local,
        budget,
        factors=factors,
        statistics=statistics,
        staleness=checked,
        model=model,
        fractions="even" if "even" in rules else "k_star",
        temperature=TEMPERATURE if spread else 0.0,
        seed=run.seed if spread else 0,
    )
    return selection, "" if checked is None else checked.verdict.value


def coordinates(model: nn.Module, choice: Choice, known: scores.Knowledge) -> list[SelectedParameter]:
    """The best coordinates of every tensor, as many as its share says; one without a share is frozen."""
    *rules, name_of_score = choice.score.split("+")
    shares = allocation.shares(model, choice.share, rules, known)
    found = []
    for name, parameter in model.named_parameters():
        if shares[name] == 0:
            parameter.requires_grad_(False)
            continue
        if shares[name] == 1:
            found.append(SelectedParameter(name, parameter, None))
            continue
        score = scores.named(name_of_score, shares[name])
        chosen = scores.top(score(known, name, tuple(parameter.shape)), shares[name])
        found.append(SelectedParameter(name, parameter, torch.tensor(chosen, dtype=torch.int32)))
    return found


def _layers(model: nn.Module, names: set[str]) -> list[SelectedParameter]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [SelectedParameter(name, each, None) for name, each in model.named_parameters() if name in names]


_MOMENTS: OrderedDict[tuple[Any, ...], Moments] = OrderedDict()


def _local(subject: Subject, run: Run, autocast: bool) -> Moments | None:
    """Moments of the run's local sample; the last few are kept, since arms of one seed share them."""
    if run.choice.local == 0:
        return None
    key = (subject.name, run.domain, run.choice.local, run.length, run.seed)
    if key not in _MOMENTS:
        _MOMENTS[key] = local_moments(subject, run.domain, run.choice.local, run.length, run.seed, autocast)
        while len(_MOMENTS) > (8 if subject.name != "smollm2" else 1):
            _MOMENTS.popitem(last=False)
    return _MOMENTS[key]


def _published(subject: Subject, run: Run) -> Factors | None:
    if not run.choice.published:
        return None
    return published_factors(subject, run.choice.published, PUBLISHED_SEQUENCES[subject.name], run.length, run.seed)


def _adapter(model: PreTrainedModel, run: Run) -> Arm:
    """A `peft` adapter on every linear layer."""
    rank = _rank(model, run.choice)
    common: dict[str, Any] = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if run.choice.arm == "shira":
            config: LoraConfig | ShiraConfig = ShiraConfig(**common, random_seed=run.seed)
        else:
            config = LoraConfig(
                **common,
                lora_alpha=2 * rank,
                use_rslora=run.choice.arm == "pissa",
                use_dora=run.choice.arm == "dora",
                init_lora_weights="pissa" if run.choice.arm == "pissa" else True,
            )
    return _adapted(model, config, run.rate)


def _bridged(model: PreTrainedModel, subject: Subject, run: Run) -> Arm:
    """LoRA with the ranks that `to_peft` deals out, of as many parameters as LoRA with one rank has."""
    choice = run.choice
    blueprint, _ = published_profile(subject, choice.published, PUBLISHED_SEQUENCES[subject.name], run.length, run.seed)
    by: Literal["k_star", "share"] = "k_star" if choice.score == "k_star" else "share"
    parameters = _rank(model, choice) * sum(each.in_features + each.out_features for each in _linear(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = to_peft(blueprint, model, Budget.parameters(parameters), by=by, task_type="CAUSAL_LM")
    return _adapted(model, config, run.rate)


def _rank(model: nn.Module, choice: Choice) -> int:
    """The rank whose parameters come nearest to the share."""
    linear = _linear(model)
    sides = sum(each.in_features + each.out_features for each in linear)
    extra = sum(each.out_features for each in linear) if choice.arm == "dora" else 0
    wanted = choice.share * sum(each.numel() for each in model.parameters()) - extra
    smallest = min(min(each.in_features, each.out_features) for each in linear)
    return max(1, min(smallest, round(wanted / sides)))


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name]


def _adapted(model: PreTrainedModel, config: LoraConfig | ShiraConfig, rate: float) -> Arm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    return Arm(adapted, _adamw(adapted, rate), trained)


def _adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate, weight_decay=0.0)
