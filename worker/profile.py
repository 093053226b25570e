"""The process that does one job's work on the device: `python -m worker.profile`, started and ended by `worker.child`.

It reads its specification as a line on stdin and speaks in JSON lines on stdout; it knows no key and opens no
connection. Whatever goes wrong in it, the model library's crashes included, ends this process and frees the device.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from gradient_blueprints.errors import BlueprintsError
from gradient_blueprints.log_lines import LogFormat, start_logging
from gradient_blueprints.models import Attachment, Blueprint, NewJob, Progress, Provenance
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.provenance import environment
from gradient_blueprints.training.profiling.state_files import load_notes, load_state, save_state
from worker.child import Specification
from worker.loading import (
    batches_of,
    check_fit,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
    one_line,
    plan_model,
    read_text,
)
from worker.sources import SourceRefused, file_digest, resolve_checkpoint, resolve_file
from worker.speaking import FAILED, FINISHED, MEMORY, PROGRESS, Speaker, end_with_parent, read_specification
from worker.texts import PackedText

logger = logging.getLogger("worker.profile")  # not __name__, which is __main__ here

FACTORS_FILE = "factors.safetensors"
STATE_FILE = "state.safetensors"
# What happens again however often these sources are tried. Anything else, a device or a disk that fails, ends this
# process, and the job has further attempts.
SUBMITTED = (BlueprintsError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
SAME = ("weights_digest", "weights_revision", "data", "seed", "notes")  # what the shards of a job must agree on
Report = Callable[[Progress], None]


def main() -> int:
    speaker = Speaker()
    start_logging(LogFormat.JSON)
    specification = Specification.model_validate_json(read_specification())
    threading.Thread(target=end_with_parent, args=(specification.folder,), daemon=True).start()

    def report(progress: Progress) -> None:
        speaker.say(PROGRESS, progress.model_dump(exclude_none=True))
        speaker.say(MEMORY, memory_in_use(specification.device))

    logger.info("working on part %d with device %s", specification.part, specification.device)
    try:
        result = work(specification, report)
    except SourceRefused as refused:
        speaker.say(FAILED, str(refused))
    except (MemoryError, torch.OutOfMemoryError) as error:
        speaker.say(FAILED, f"out of memory: {one_line(error)}; try a smaller batch_size or sequence_length")
    except SUBMITTED as error:
        logging.exception("the job failed")
        speaker.say(FAILED, f"{type(error).__name__}: {one_line(error)}")
    else:
        speaker.say(FINISHED, result)
    return 0


def memory_in_use(wanted: str) -> tuple[str, int]:
    """The device that does the work, and the bytes that this process has of its memory."""
    device = choose_device(wanted)
    match device.type:
        case "cuda":
            return str(device), torch.cuda.memory_reserved(device)
        case "mps":
            return str(device), torch.mps.driver_allocated_memory()
        case _:
            return str(device), int(psutil.Process().memory_info().rss)


# --- the work


def work(specification: Specification, report: Report) -> dict[str, Any]:
    """The document of a whole job or of its merged shards; of one shard the name of the file with its state."""
    if specification.fetched.states:
        return merge_shards(specification, report).to_dict()
    if specification.job.options.shards > 1:
        return {"state": profile_shard(specification, report).name}
    return profile(specification, report).to_dict()


def profile(specification: Specification, report: Report) -> Blueprint:
    """Load what the job names, run its batches, and describe the gradients with what they were computed from."""
    measured = measure(specification, report)
    report(Progress(phase="fitting", done=measured.batches, total=measured.batches))
    return _describe(specification, measured.profiler, measured.provenance)


def profile_shard(specification: Specification, report: Report) -> Path:
    """The same for every `shards`-th batch of each domain, kept as a state that merges with those of the others."""
    measured = measure(specification, report)
    report(Progress(phase="saving", done=measured.batches, total=measured.batches))
    profiler, seed = measured.profiler, specification.job.options.seed
    known = environment(profiler.model, seed, None).model_dump(exclude_none=True)
    notes = {
        "config": measured.config,
        "provenance": known | measured.provenance.model_dump(mode="json", exclude_none=True),
    }
    return save_state(profiler.state(), specification.folder / STATE_FILE, notes)


def merge_shards(specification: Specification, report: Report) -> Blueprint:
    """The document of all shards, as one run would have given it; neither weights nor texts are needed for it."""
    report(Progress(phase="merging"))
    states = specification.fetched.states
    notes = [load_notes(path) for path in states]
    provenance = _common_provenance([noted["provenance"] for noted in notes])
    view = specification.folder / "configuration"
    view.mkdir()
    (view / "config.json").write_text(json.dumps(notes[0]["config"]))
    profiler = _profiler(specification.job, plan_model(load_config(view)))
    for path in states:
        profiler.absorb(load_state(path))  # one at a time, each may be as large as the model
    return _describe(specification, profiler, provenance)


@dataclass(frozen=True)
class Measured:
    """What the batches of a job, or of a shard of it, came to."""

    profiler: GradientProfiler
    provenance: Provenance
    config: dict[str, Any]
    batches: int


def measure(specification: Specification, report: Report) -> Measured:
    job, options = specification.job, specification.job.options
    report(Progress(phase="checking sources"))
    where = specification.where
    checkpoint = resolve_checkpoint(*where(job.source), max_model_bytes=specification.max_model_bytes)
    texts = {
        domain: resolve_file(*where(data.source), limit=specification.max_text_bytes)
        for domain, data in job.data.items()
    }
    weights_digest = checkpoint.digest()
    view = specification.folder / "checkpoint"
    checkpoint.link_into(view)

    report(Progress(phase="reading text"))
    config = load_config(view)
    tokenizer = load_tokenizer(view, config)
    packed = {domain: read_text(job, domain, path, tokenizer) for domain, path in texts.items()}

    report(Progress(phase="loading the model"))
    device = choose_device(specification.device)
    model = load_model(view, config, device, specification.max_model_bytes, checkpoint.tensors)
    check_fit(model, job, packed)

    torch.manual_seed(options.seed)
    numbers = {
        domain: range(specification.part, len(text.sequences) // options.batch_size, options.shards)
        for domain, text in packed.items()
    }
    done, total = 0, sum(map(len, numbers.values()))
    with _profiler(job, model, tokenizer) as profiler:
        for domain, text in packed.items():
            for number, batch in batches_of(text.sequences, options.batch_size, numbers[domain], device):
                report(Progress(phase="profiling", done=done, total=total))
                profiler.step(batch, domain=domain, key=number)
                done += 1
    provenance = _provenance(job, packed, weights_digest, specification.fetched.weights_revision)
    return Measured(profiler, provenance, checkpoint.config, total)


def _profiler(job: NewJob, model: Any, tokenizer: Any = None) -> GradientProfiler:
    """The general domain is named beforehand, because a shard may hold no batch of it."""
    return GradientProfiler(
        model,
        tokenizer,
        groups=job.options.granularity,
        seed=job.options.seed,
        statistic=job.options.statistic,
        general="general" if "general" in job.data else min(job.data),
        digests=False,  # the worker's own are of the files
    )


def _describe(specification: Specification, profiler: GradientProfiler, provenance: Provenance) -> Blueprint:
    job = specification.job
    blueprint = profiler.blueprint(
        model_id=job.model_id, training_checkpoint=job.training_checkpoint, provenance=provenance
    )
    return _attach(blueprint, profiler.save_factors(specification.folder / FACTORS_FILE))


# --- provenance


def _provenance(
    job: NewJob, packed: dict[str, PackedText], weights_digest: str, weights_revision: str | None
) -> Provenance:
    """What only the worker knows; the profiler adds what it ran."""
    return Provenance.model_validate(
        {
            "weights_digest": weights_digest,
            "weights_revision": weights_revision,
            "data": {
                # the file's name, not its path: a blueprint is public, the lab's folders are not
                domain: {
                    "digest": text.digest,
                    "source": Path(job.data[domain].source).name,
                    "documents": text.documents,
                    "tokens": text.tokens,
                }
                for domain, text in packed.items()
            },
            "notes": job.provenance_notes,
        }
    )


def _common_provenance(found: Sequence[Mapping[str, Any]]) -> Provenance:
    """What all shards were run on. They may have run on different machines, and then all of them are named."""
    for name in SAME:
        for shard, one in enumerate(found):
            if one.get(name) != found[0].get(name):
                raise SourceRefused(f"shard {shard} saw other {name} than shard 0: a source changed while the job ran")
    merged = dict(found[0])
    for name in ("profiler", "dtype", "device"):
        merged[name] = _each_once(one[name] for one in found)
    merged["versions"] = {
        package: _each_once(one["versions"][package] for one in found if package in one["versions"])
        for package in sorted({package for one in found for package in one["versions"]})
    }
    return Provenance.model_validate(merged)


def _each_once(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def _attach(blueprint: Blueprint, factors: Path) -> Blueprint:
    """Name the factors in the document; the parent uploads them from the job's folder."""
    attachment = Attachment(
        name=factors.name,
        media_type="application/octet-stream",
        digest=file_digest(factors),
        size=factors.stat().st_size,
    )
    return blueprint.model_copy(update={"attachments": (*(blueprint.attachments or ()), attachment)})


if __name__ == "__main__":
    sys.exit(main())
