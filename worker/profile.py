"""The process that does one job's work on the device: `python -m worker.profile`, started and ended by `worker.child`.

It reads its specification as a line on stdin and speaks in JSON lines on stdout; it knows no key and opens no
connection. Whatever goes wrong in it, the model library's crashes included, ends this process and frees the device.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gradient_blueprints.models import Attachment, Blueprint, NewJob, Progress, Provenance
from gradient_blueprints.training.profiling import GradientProfiler
from worker.child import Specification
from worker.sources import SourceRefused, file_digest, resolve_checkpoint, resolve_file
from worker.speaking import FAILED, FINISHED, PROGRESS, Speaker, end_with_parent, read_specification
from worker.texts import PackedText, pack

FACTORS_FILE = "factors.safetensors"
Report = Callable[[Progress], None]


def main() -> int:
    speaker = Speaker()
    logging.basicConfig(level=logging.INFO)
    specification = Specification.model_validate_json(read_specification())
    threading.Thread(target=end_with_parent, args=(specification.folder,), daemon=True).start()

    def report(progress: Progress) -> None:
        speaker.say(PROGRESS, progress.model_dump(exclude_none=True))

    try:
        blueprint = profile(specification, report)
    except SourceRefused as refused:
        speaker.say(FAILED, str(refused))
    except (MemoryError, torch.OutOfMemoryError) as error:
        speaker.say(FAILED, f"out of memory: {_one_line(error)}; try a smaller batch_size or sequence_length")
    except Exception as error:
        logging.exception("the job failed")
        speaker.say(FAILED, f"{type(error).__name__}: {_one_line(error)}")
    else:
        speaker.say(FINISHED, blueprint.to_dict())
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or "no message"


# --- the work


def profile(specification: Specification, report: Report) -> Blueprint:
    """Load what the job names, run its batches, and describe the gradients with what they were computed from."""
    job = specification.job
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
    config = _load_config(view)
    tokenizer = _load_tokenizer(view, config)
    packed = {domain: _pack(job, domain, path, tokenizer) for domain, path in texts.items()}

    report(Progress(phase="loading the model"))
    device = choose_device(specification.device)
    model = _load_model(view, config, device, specification.max_model_bytes)
    _check_fit(model, job, packed)

    torch.manual_seed(job.options.seed)
    total = sum(len(text.sequences) // job.options.batch_size for text in packed.values())
    with GradientProfiler(
        model,
        tokenizer,
        groups=job.options.granularity,
        seed=job.options.seed,
        statistic=job.options.statistic,
    ) as profiler:
        done = 0
        for domain, text in packed.items():
            for batch in _batches(text.sequences, job.options.batch_size, device):
                report(Progress(phase="profiling", done=done, total=total))
                profiler.step(batch, domain=domain)
                done += 1
        report(Progress(phase="fitting", done=total, total=total))
        blueprint = profiler.blueprint(
            model_id=job.model_id,
            training_checkpoint=job.training_checkpoint,
            provenance=_provenance(job, packed, weights_digest, specification.fetched.weights_revision),
        )
        return _attach(blueprint, profiler.save_factors(specification.folder / FACTORS_FILE))


def choose_device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def _load_config(view: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(view, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise SourceRefused(f"config.json describes no causal language model: {_one_line(error)}") from error


def _load_tokenizer(view: Path, config: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(view, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise SourceRefused(f"the checkpoint's tokenizer cannot be loaded: {_one_line(error)}") from error


def _load_model(view: Path, config: Any, device: torch.device, max_model_bytes: int) -> Any:
    """In the stored dtype, but in float32 on a CPU, where half precision is slow and its sums are coarse."""
    try:
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise SourceRefused(f"config.json describes no causal language model: {_one_line(error)}") from error
    size = sum(parameter.numel() for parameter in planned.parameters()) * 4
    if size > max_model_bytes:
        raise SourceRefused(
            f"the model of config.json takes {size:,} bytes in float32; this worker takes at most {max_model_bytes:,}"
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            view,
            config=config,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            output_loading_info=True,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SourceRefused(f"the weights cannot be loaded: {_one_line(error)}") from error
    # What is missing would be filled with random numbers, and their gradients published as the model's.
    if missing := sorted(loading["missing_keys"]):
        raise SourceRefused(
            f"the weights lack {len(missing)} tensors that config.json asks for, such as {missing[0]!r}"
        )
    if loading.get("mismatched_keys"):
        raise SourceRefused(
            f"the weights do not have the shapes that config.json asks for: {loading['mismatched_keys']}"
        )
    return model.to(device).eval()


def _pack(job: NewJob, domain: str, path: Path, tokenizer: Any) -> PackedText:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    data = job.data[domain]
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    try:
        return pack(
            path,
            field=data.field,
            text_format=data.format,
            packing=data.packing,
            max_tokens=data.max_tokens,
            encode=encode,
            separator=separator,
            sequence_length=job.options.sequence_length,
            batch_size=job.options.batch_size,
            batches=job.options.batches,
            seed=job.options.seed,
        )
    except SourceRefused as refused:
        raise SourceRefused(f"domain {domain!r}: {refused}") from None


def _check_fit(model: Any, job: NewJob, packed: dict[str, PackedText]) -> None:
    """What would otherwise end in an index error somewhere inside the model."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and job.options.sequence_length > longest:
        raise SourceRefused(
            f"the model takes sequences of at most {longest:,} tokens, "
            f"and sequence_length is {job.options.sequence_length:,}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(max(map(max, text.sequences)) for text in packed.values())
    if largest >= vocabulary:
        raise SourceRefused(
            f"the tokenizer gives ids up to {largest:,}, and the model has embeddings for {vocabulary:,}: "
            "they do not belong together"
        )


def _batches(sequences: list[list[int]], size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(sequences), size):
        rows = sequences[start : start + size]
        longest = max(map(len, rows))
        ids = [row + [0] * (longest - len(row)) for row in rows]  # what stands in for padding is masked
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        yield {
            "input_ids": torch.tensor(ids, device=device),  # (batch, sequence)
            "attention_mask": torch.tensor(mask, device=device),
        }


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
