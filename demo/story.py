"""The story of the registry in five acts, played through the public SDK against the running service."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress, TaskID
from safetensors.torch import load_file
from transformers import PreTrainedModel

from demo import models, report, service, texts
from demo.adapting import fine_tune, norms_by_batch
from demo.findings import UNTUNED, Adapted, Findings, agreement_text
from demo.models import Batch, Checkpoint, GptSize
from demo.screen import Screen, megabytes
from gradient_blueprints import Blueprint, Client, Job, JobState, Scope
from gradient_blueprints.statistics_models import Staleness
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.selection import (
    BYTES_PER_COORDINATE,
    BYTES_PER_DENSE_PARAMETER,
    Budget,
    Selection,
    mean_gradients,
    select,
)

GPT = "mini-gpt"
SMOLLM2 = "smollm2-135m"
FRACTIONS = (0.5, 0.8, 1.0)
CORES = os.cpu_count() or 1
LAB, SECOND_LAB, ADAPTER = "foundation-lab", "second-lab", "adapter"


class Way(StrEnum):
    """How what is trained is chosen."""

    EVERYTHING = "everything"
    PUBLISHED = "published factors"
    LOCAL = "local gradient"
    RANDOM = "random coordinates"
    LAYERS = "whole layers by norm"


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning, with a budget: the training memory of this share of the coordinates."""

    way: Way
    share: float
    learning_rate: float

    @property
    def name(self) -> str:
        return self.way.value if self.way is Way.EVERYTHING else f"{self.way.value}, {100 * self.share:g} %"


@dataclass(frozen=True)
class Adaptation:
    """One fine-tuning task."""

    domain: str
    steps: int
    batch: int
    length: int
    heldout_batches: int
    sample_batches: int
    """Batches of the local sample, of `batch` sequences, from the head of the training data."""
    arms: tuple[Arm, ...]
    """The second is what the adapter chooses; the first, everything, is what it is measured against."""
    rates_tuned: bool = True


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    gpt: GptSize
    profile: dict[str, Any]
    adapt_gpt: Adaptation
    profile_smollm2: dict[str, Any] | None
    """None leaves SmolLM2 out."""
    adapt_smollm2: Adaptation | None


# Learning rates are fixed beforehand. Small GPT: for everything, and for each way at 2.5 %, the best of a factor-two
# grid with its optimum inside, on text that the demo does not measure on; at 10 and 25 % by the local gradient's grid;
# for whole layers the better of 4e-3 and 8e-3. SmolLM2: of the same order relative to each other, not tuned.
GPT_ARMS = (
    Arm(Way.EVERYTHING, 1.0, 2e-3),
    Arm(Way.PUBLISHED, 0.025, 1.6e-2),
    Arm(Way.PUBLISHED, 0.1, 8e-3),
    Arm(Way.PUBLISHED, 0.25, 4e-3),
    Arm(Way.LOCAL, 0.025, 1.6e-2),
    Arm(Way.RANDOM, 0.025, 3.2e-2),
    Arm(Way.LAYERS, 0.1, 4e-3),
)
SMOLLM2_ARMS = (Arm(Way.EVERYTHING, 1.0, 5e-5), Arm(Way.LOCAL, 0.05, 4e-4))
SHORT_ARMS = (GPT_ARMS[0], Arm(Way.PUBLISHED, 0.1, 8e-3), Arm(Way.LOCAL, 0.1, 8e-3), Arm(Way.RANDOM, 0.1, 1.6e-2))
FULL = Scale(
    gpt=GptSize(),
    profile={"batches": 16, "batch_size": 4, "sequence_length": 128},
    adapt_gpt=Adaptation("code", 60, 8, 128, 8, 8, GPT_ARMS),
    profile_smollm2={"batches": 4, "batch_size": 4, "sequence_length": 128},
    adapt_smollm2=Adaptation("legal", 8, 4, 128, 4, 4, SMOLLM2_ARMS, rates_tuned=False),
)
SHORT = Scale(
    gpt=GptSize(layers=2, width=64, vocabulary=512, steps=40, batch=4, length=64),
    profile={"batches": 4, "batch_size": 2, "sequence_length": 64},
    adapt_gpt=Adaptation("code", 15, 4, 64, 2, 4, SHORT_ARMS),
    profile_smollm2=None,
    adapt_smollm2=None,
)


def play(work: Path, report_path: Path, scale: Scale, elsewhere: service.Service | None = None) -> Findings:
    """Play all five acts and write the report; `elsewhere` is a service that runs already, else one is started."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    screen, found = Screen(), Findings()
    screen.say("Gradient blueprints: a lab publishes where its model learns, an adapter trains only there.")
    with contextlib.ExitStack() as stack:
        screen.act("The registry starts")
        shared = max(1, CORES // 2)
        running = elsewhere or stack.enter_context(service.running(work, threads=shared))
        screen.good(f"Postgres, Valkey, API, relay and workers run; {running.url}/docs")
        clients = {name: stack.enter_context(client) for name, client in _clients(running, work / "cache").items()}
        screen.good(f"labs {', '.join(clients)} with a key each")
        corpora = {name: texts.DOMAINS[name]() for name in ("english", "code", "legal")}
        torch.set_num_threads(shared)
        _labs_publish(screen, clients[LAB], work, corpora, scale, found, upload=not running.here)
        torch.set_num_threads(CORES)
        _second_lab_publishes(screen, clients[SECOND_LAB], work, corpora, scale, found)
        _adapter_adapts(screen, clients[ADAPTER], work, corpora, scale, found)
        found.versions = _versions(clients[ADAPTER], [GPT, *([SMOLLM2] if scale.profile_smollm2 else [])])
        screen.act("5  The report")
        report.write(report_path, found)
        screen.good(f"{report_path} ({report_path.stat().st_size / 1e3:.0f} kB, opens anywhere)")
    stopped = "the service goes on" if elsewhere else "everything that was started is stopped"
    screen.good(f"{stopped}; {screen.elapsed()} in all")
    return found


def _clients(running: service.Service, cache: Path) -> dict[str, Client]:
    scopes = {LAB: [Scope.PUBLISH, Scope.PROFILE], SECOND_LAB: [Scope.PUBLISH], ADAPTER: [Scope.READ]}
    with Client(running.url, api_key=running.admin_key, cache=False) as operator:
        for lab in scopes:
            operator.create_lab(lab)
        keys = {lab: operator.create_key(lab, wanted, name="demo").secret for lab, wanted in scopes.items()}
    return {lab: Client(running.url, api_key=key, cache=cache / lab) for lab, key in keys.items()}


# --- 1 and 2: a lab submits checkpoints, the worker profiles them


def _labs_publish(
    screen: Screen,
    client: Client,
    work: Path,
    corpora: dict[str, texts.Domain],
    scale: Scale,
    found: Findings,
    *,
    upload: bool,
) -> None:
    screen.act("1  A lab submits checkpoints")
    domains = {"general": corpora["english"], "code": corpora["code"]}
    files = {name: _write(work / f"validation-{name}.txt", domain.validation) for name, domain in domains.items()}
    for name, domain in domains.items():
        screen.note(f"validation text {name!r}: {domain.source}, {len(domain.validation) / 1e3:,.0f} kB")
    jobs: list[Job] = []
    with screen.bars() as bars:
        watchers: list[threading.Thread] = []

        def submit(checkpoint: Checkpoint, options: dict[str, Any], notes: str) -> None:
            subject = checkpoint.model_id, checkpoint.fraction
            source: Path | str = checkpoint.folder
            data: dict[str, Path | str] = dict(files)
            if upload:
                client.upload_checkpoint(checkpoint.folder, *subject)
                uploaded = {name: client.upload_checkpoint_file(file, *subject).path for name, file in files.items()}
                source, data = "store", {name: f"store:{path}" for name, path in uploaded.items()}
            job = client.submit_checkpoint(*subject, source=source, data=data, notes=notes, **options)
            jobs.append(job)
            bars.console.print(
                f"  {checkpoint.model_id} at {checkpoint.fraction:g} is saved and submitted: job {job.id}"
            )
            batches = len(files) * options["batches"]
            watchers.append(threading.Thread(target=_watch, args=(client, job, batches, bars), daemon=True))
            watchers[-1].start()

        if scale.profile_smollm2 is not None:
            task = bars.add_task(f"{SMOLLM2}: GGUF to safetensors", total=1, note="weights dequantised from 4 bits")
            folder = models.convert_smollm2(work / SMOLLM2)
            bars.update(task, completed=1)
            submit(Checkpoint(SMOLLM2, 1.0, folder), scale.profile_smollm2, models.SMOLLM2_NOTES)
        task = bars.add_task(f"{GPT}: pre-training on English", total=scale.gpt.steps, note="")

        def learnt(step: int, loss: float) -> None:
            found.pretraining.append(loss)
            bars.update(task, completed=step, note=f"loss {loss:.2f}")

        for checkpoint in models.pretrain_gpt(GPT, corpora["english"].training, work, scale.gpt, FRACTIONS, learnt):
            notes = (
                f"pre-trained on the spot, {round(checkpoint.fraction * scale.gpt.steps)} of {scale.gpt.steps} steps"
            )
            submit(checkpoint, scale.profile, notes)
        for watcher in watchers:
            watcher.join()

    screen.act("2  The worker has profiled them: version 1 of each checkpoint")
    for job in jobs:
        done = client.get_job(job.id)
        if done.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"the job for {job.model_id} ended {done.state}: {done.reason}")
        blueprint = client.fetch_blueprint(job.model_id, job.training_checkpoint)
        if (blueprint.version, blueprint.lab, blueprint.digest) != (1, LAB, done.digest):
            raise RuntimeError(f"expected version 1 by {LAB}, the registry answers {blueprint!r} by {blueprint.lab}")
        screen.good(repr(blueprint)[1:-1])
        if job.model_id == GPT:
            found.checkpoints.append(blueprint)
        else:
            found.domains = blueprint
        largest = sorted(blueprint.layers, key=lambda layer: -layer.gradient_norm)[:3]
        screen.note("largest gradients: " + ", ".join(f"{x.id} {x.gradient_norm:.3g}" for x in largest))
    if found.domains is not None and found.domains.provenance is not None:
        screen.note(f"provenance: {found.domains.provenance.notes}")
    change = client.compare_blueprints(GPT, 0.5, 1.0)
    screen.call(f"client.compare_blueprints({GPT!r}, 0.5, 1.0)")
    correlation = "–" if change.spearman is None else f"{change.spearman:.2f}"
    screen.answer(f"layer ranks at 50 % and 100 % of training correlate {correlation} over {change.matched} layers")


def _watch(client: Client, job: Job, batches: int, bars: Progress) -> None:
    """Show a job's event stream as a bar."""
    name = f"{job.model_id} at {job.training_checkpoint:g}: profiling"
    task = bars.add_task(name, total=batches, note="queued")
    for event in client.watch_job(job.id):
        progress = event.progress
        if event.state.terminal or progress is None:
            bars.update(task, note=event.state.value if event.reason is None else f"{event.state}: {event.reason}")
        else:
            done = progress.done if progress.total else 0
            bars.update(task, completed=done, total=progress.total or batches, note=progress.phase)
        if event.state is JobState.SUCCEEDED:
            bars.update(task, completed=bars.tasks[task].total)
    bars.stop_task(task)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- 3: a second lab has its own view of the same checkpoint


def _second_lab_publishes(
    screen: Screen, client: Client, work: Path, corpora: dict[str, texts.Domain], scale: Scale, found: Findings
) -> None:
    screen.act("3  A second lab uploads its own blueprints of the same checkpoint")
    model, tokenizer = models.load(work / f"{GPT}-1")
    tokens = models.tokenize(tokenizer, corpora["legal"].training)
    options = scale.profile
    batches = list(
        models.random_batches(tokens, options["batches"], options["batch_size"], options["sequence_length"], seed=3)
    )
    half = _profile(model, batches[: len(batches) // 2], "legal").blueprint(GPT, 1.0)
    whole = _profile(model, batches, "legal").blueprint(GPT, 1.0)
    json_file = _write(work / "second-lab.json", half.to_json())
    csv_file = _write(work / "second-lab.csv", whole.to_csv())
    for file in (json_file, csv_file):
        published = client.publish_blueprint(file)
        screen.call(f"client.publish_blueprint({file.name!r})")
        screen.answer(
            f"version {published.version} by {published.lab}, {published.digest[:19]}, {file.stat().st_size:,} B"
        )
    again = client.publish_blueprint(whole)
    screen.answer(f"the CSV's content as JSON is the same document: version {again.version}, created {again.created}")
    default = client.fetch_blueprint(GPT, 1.0)
    theirs = client.fetch_blueprint(GPT, 1.0, lab=SECOND_LAB)
    if (default.digest, theirs.digest) != (found.checkpoints[-1].digest, whole.digest):
        raise RuntimeError("a second lab's upload changed what the default fetch answers")
    screen.call(f"client.fetch_blueprint({GPT!r}, 1.0)")
    screen.answer(f"still version {default.version} by {default.lab}")
    screen.call(f"client.fetch_blueprint({GPT!r}, 1.0, lab={SECOND_LAB!r})")
    screen.answer(f"version {theirs.version} by {theirs.lab}")


def _profile(model: PreTrainedModel, batches: Sequence[Batch], domain: str) -> GradientProfiler:
    with GradientProfiler(model) as profiler:
        for batch in batches:
            profiler.step(batch, domain=domain)
    return profiler


# --- 4: an adapter brings the models to other domains


def _adapter_adapts(
    screen: Screen, client: Client, work: Path, corpora: dict[str, texts.Domain], scale: Scale, found: Findings
) -> None:
    tasks = [(GPT, 0.8, f"{GPT}-0.8", scale.adapt_gpt)]
    if scale.adapt_smollm2 is not None:
        tasks.append((SMOLLM2, 1.0, SMOLLM2, scale.adapt_smollm2))
    for model_id, checkpoint, folder, task in tasks:
        screen.act(f"4  An adapter takes {model_id} to another domain: {task.domain}")
        screen.call(f"blueprint = client.fetch_blueprint({model_id!r}, {checkpoint})")
        blueprint = client.fetch_blueprint(model_id, checkpoint)
        screen.answer(repr(blueprint)[1:-1])
        factors = load_file(client.fetch_factors(blueprint))
        published = sorted({key.split("/")[0] for key in factors})
        screen.answer(f"with row and column factors for {', '.join(published)}")
        found.adaptations.append(_adapt(screen, client, blueprint, factors, work / folder, corpora[task.domain], task))


def _adapt(
    screen: Screen,
    client: Client,
    blueprint: Blueprint,
    factors: dict[str, torch.Tensor],
    folder: Path,
    corpus: texts.Domain,
    task: Adaptation,
) -> Adapted:
    model, tokenizer = models.load(folder)
    tokens = models.tokenize(tokenizer, corpus.training)
    batches = list(models.random_batches(tokens, task.steps, task.batch, task.length, seed=4))
    heldout = models.ordered_batches(
        models.tokenize(tokenizer, corpus.heldout), task.heldout_batches, task.batch, task.length
    )
    sample = batches[: task.sample_batches]
    local, staleness = _check_staleness(screen, client, model, blueprint, sample, task)

    own = any(key.startswith(f"{task.domain}/") for key in factors)
    screen.answer(
        f"the lab published factors of {task.domain!r} too: they say where to train, whatever general text says"
        if own
        else f"nobody published factors of {task.domain!r}: the local gradient says where to train"
    )
    gradients = mean_gradients(model, sample)
    total = sum(parameter.numel() for parameter in model.parameters())

    def choose(arm: Arm) -> Selection | None:
        budget = Budget.bytes(arm.share * total * BYTES_PER_COORDINATE)
        match arm.way:
            case Way.PUBLISHED:
                return select(blueprint, local, budget, factors=factors, domain=task.domain)
            case Way.LOCAL:
                return select(blueprint, local, budget, gradients=gradients)
            case Way.RANDOM:
                return select(blueprint, budget=budget)
            case Way.LAYERS:
                return select(blueprint, local, budget, unit="layer")
            case Way.EVERYTHING:
                return None

    first_arm = task.arms[1]
    chosen = choose(first_arm)
    assert chosen is not None
    known = f"factors=factors, domain={task.domain!r}" if first_arm.way is Way.PUBLISHED else "gradients=gradients"
    allowed, full_bytes = first_arm.share * total * BYTES_PER_COORDINATE, total * BYTES_PER_DENSE_PARAMETER
    screen.call(f"selection = select(blueprint, local, Budget.bytes({allowed:,.0f}), {known})")
    screen.answer(chosen.summary(top=5))
    screen.note(
        f"full fine-tuning holds {megabytes(full_bytes)} of moments and gradients; "
        f"the budget, {megabytes(allowed)}, is {allowed / full_bytes:.1%} of that"
    )
    base = models.mean_loss(model, heldout)
    outcomes = []
    screen.call("optimizer = SelectedAdamW(apply_selection(model, selection), lr=...)")
    with screen.bars() as bars:
        for arm in task.arms:
            bar = bars.add_task(arm.name, total=task.steps, note="")
            selection, advance = choose(arm), partial(_advance, bars, bar)
            outcome = fine_tune(arm.name, model, selection, batches, heldout, arm.learning_rate, advance)
            bars.update(bar, note=f"held-out loss {outcome.loss:.3f}")
            outcomes.append(outcome)
    full, *others = outcomes
    adapted = Adapted(
        blueprint, task.domain, task.steps, task.rates_tuned, staleness, chosen, base, full, tuple(others)
    )
    _show_outcomes(screen, adapted, task)
    return adapted


def _advance(bars: Progress, bar: TaskID, step: int) -> None:
    bars.update(bar, completed=step)


def _check_staleness(
    screen: Screen,
    client: Client,
    model: PreTrainedModel,
    blueprint: Blueprint,
    sample: Sequence[Batch],
    task: Adaptation,
) -> tuple[Blueprint, Staleness]:
    """Profile the local sample once, for its own blueprint and for the norms of each batch."""
    profiler = _profile(model, sample, task.domain)
    local = profiler.blueprint(blueprint.model_id, blueprint.training_checkpoint)
    norms = norms_by_batch(profiler, task.domain)
    screen.call("client.check_staleness(model, checkpoint, local_norms)    # per layer the norm of every local batch")
    checked = client.check_staleness(blueprint.model_id, blueprint.training_checkpoint, norms, domain=task.domain)
    agreement = agreement_text(checked)
    screen.answer(f"{checked.verdict}: {agreement}, from {len(sample) * task.batch} sequences of {task.length} tokens")
    return local, checked


def _show_outcomes(screen: Screen, adapted: Adapted, task: Adaptation) -> None:
    rows = [
        (
            outcome.name,
            f"{outcome.trained:,}",
            f"{outcome.learning_rate:g}",
            f"{outcome.loss:.3f}",
            f"{adapted.share_of_gain(outcome):.0%}",
            megabytes(outcome.optimizer_bytes),
            megabytes(outcome.training_bytes),
            f"{outcome.seconds:.0f} s",
        )
        for outcome in (adapted.full, *adapted.outcomes)
    ]
    columns = ("trained", "parameters", "lr", "held-out", "gain", "optimizer", "+gradients", "time")
    screen.table(columns, [("nothing", "0", "", f"{adapted.base_loss:.3f}", "0%", "", "", ""), *rows])
    screen.note(
        f"AdamW, {task.steps} steps of {task.batch} × {task.length} tokens, the same for all. held-out: loss in nats "
        "per token; gain: share of full fine-tuning's. Memory as measured; it is what is saved, time is not. One seed: "
        "differences of 0.02 mean nothing."
    )
    if not adapted.rates_tuned:
        screen.note(UNTUNED)


def _versions(client: Client, model_ids: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of what the registry now holds."""
    return [
        (
            model_id,
            f"{version.training_checkpoint:g}",
            str(version.version),
            version.lab,
            str(version.layers),
            f"{version.size:,} B",
            version.digest,
        )
        for model_id in model_ids
        for checkpoint in client.list_checkpoints(model_id)
        for version in sorted(
            client.list_versions(model_id, checkpoint.training_checkpoint), key=lambda version: version.version
        )
    ]
