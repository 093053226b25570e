"""One fine-tuning run: the same steps on the same data for every arm, and what it cost."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

import torch
from transformers import PreTrainedModel

from demo.models import ordered_batches
from evidence import models
from evidence.arms import Arm, build
from evidence.data import training_batches
from evidence.models import Batch, Subject
from evidence.runs import Published, Result, Run
from evidence.texts import Part
from gradient_blueprints.run_models import Resource
from gradient_blueprints.training.finetuning import SelectedAdamW, optimizer_bytes
from gradient_blueprints.training.resources import ResourceMeter

WARMUP = 0.1
JUDGED, ENGLISH = {"gpt": 12, "gpt-series": 12, "smollm2": 8, "tiny": 4}, 4
"""Batches of 8 sequences."""
AUTOCAST = True
"""float32 weights and optimizer, bfloat16 matrix products, for every arm alike."""


def train(subject: Subject, run: Run) -> Result:
    """Fine-tune and measure; equal runs give equal losses on one machine."""
    base, english_base = losses_before(subject, run)
    judged, english = _judged(subject, run)
    started = time.process_time()
    arm = build(subject, run, AUTOCAST)
    batches = training_batches(subject, run)
    selection_cpu = time.process_time() - started
    started, cpu_started = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        meter = stack.enter_context(ResourceMeter(arm.model, arm.optimizer)) if run.purpose == "meter" else None
        gradient_bytes, largest = _fit(arm, batches, run)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    held = (
        arm.optimizer.optimizer_bytes() if isinstance(arm.optimizer, SelectedAdamW) else optimizer_bytes(arm.optimizer)
    )
    return Result(
        base=base,
        loss=mean_loss(arm.model, judged),
        english_base=english_base,
        english=mean_loss(arm.model, english),
        trained=arm.trained,
        parameters=sum(each.numel() for each in subject.model.parameters()),
        optimizer_bytes=held,
        gradient_bytes=gradient_bytes,
        largest_gradient_bytes=largest,
        seconds=round(seconds, 3),
        cpu_seconds=round(cpu_seconds, 3),
        selection_cpu_seconds=round(selection_cpu, 3),
        verdict=arm.verdict,
        spent=None if meter is None else _spent(meter),
        texts=models.digest(run.domain, subject.work),
        published_texts=models.digest(Published.parse(run.choice.published).domain, subject.work)
        if run.choice.published
        else "",
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(),
    )


def _machine() -> str:
    """What decides how products are rounded."""
    matrices = "AMX" if torch.cpu.get_capabilities().get("amx_bf16") else "no AMX"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return (
        f"{platform.machine()} with {matrices}{f', oneDNN held to {limit}' if limit else ''}, "
        f"{torch.get_num_threads()} thread, torch {torch.__version__}"
    )


def _spent(meter: ResourceMeter) -> dict[str, float]:
    tally = meter.tally()
    amounts = {resource.value: getattr(tally, resource.value, None) for resource in Resource}
    return {name: amount for name, amount in amounts.items() if amount is not None}


def _fit(arm: Arm, batches: Sequence[Batch], run: Run) -> tuple[int, int]:
    """AdamW without decay; warmup over a tenth, then to zero in a straight line or constant.

    Answers the bytes of gradients that are held at a step, and of the largest that exists beside them.
    """
    arm.model.train()
    scheduler = torch.optim.lr_scheduler.LambdaLR(arm.optimizer, _schedule(run))
    gradient_bytes, largest = 0, 0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            loss = arm.model(**batch).loss
        loss.backward()
        if isinstance(arm.optimizer, SelectedAdamW):
            gradient_bytes = arm.optimizer.training_bytes() - arm.optimizer.optimizer_bytes()
            largest = arm.optimizer.largest_gradient_bytes
        else:
            gradient_bytes = sum(each.grad.nbytes for each in arm.model.parameters() if each.grad is not None)
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        scheduler.step()
    return gradient_bytes, largest


def _schedule(run: Run) -> Callable[[int], float]:
    warmup = max(1, round(WARMUP * run.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1.0 if run.schedule == "constant" else (run.steps - step) / (run.steps - warmup)

    return factor


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Nats per token."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
        losses = [float(model(**batch).loss) for batch in batches]
    return sum(losses) / len(losses)


_LOSSES_BEFORE: dict[tuple[str, str, str, int], tuple[float, float]] = {}


def losses_before(subject: Subject, run: Run) -> tuple[float, float]:
    """Of the model as it is, on the text that judges the run and on English; nats per token."""
    key = (subject.name, run.domain, text_that_judges(run), run.length)
    if key not in _LOSSES_BEFORE:
        judged, english = _judged(subject, run)
        _LOSSES_BEFORE[key] = mean_loss(subject.model, judged), mean_loss(subject.model, english)
    return _LOSSES_BEFORE[key]


def _judged(subject: Subject, run: Run) -> tuple[list[Batch], list[Batch]]:
    """The text that judges the run, and English."""
    text = subject.tokens(run.domain, text_that_judges(run))
    english = subject.tokens("english", "heldout")
    return (
        ordered_batches(text, JUDGED[run.model], 8, run.length),
        ordered_batches(english, ENGLISH, 8, run.length),
    )


def text_that_judges(run: Run) -> Part:
    """Held-out text what is confirmed, development text what is looked for."""
    return "heldout" if run.purpose in ("confirm", "meter") else "development"
