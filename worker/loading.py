"""From checked files to what a profiler takes: the model on its device, and batches of token ids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gradient_blueprints.models import NewJob
from worker.sources import SourceRefused, raise_fault_of_machine
from worker.texts import PackedText, format_of, pack

SPARE_PARAMETERS = 1_000


def choose_device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def load_config(view: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(view, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"config.json describes no causal language model: {one_line(error)}") from error


def load_tokenizer(view: Path, config: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(view, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"the checkpoint's tokenizer cannot be loaded: {one_line(error)}") from error


def plan_model(config: Any, tensors: int | None = None) -> Any:
    """The model of a configuration without its weights. It must not have many more parameters than there are `tensors`.

    Each takes memory and time even without its weights, and a short config.json may ask for a billion.
    """
    most = math.inf if tensors is None else 2 * tensors + SPARE_PARAMETERS
    registered = itertools.count(1)

    def count(*_: object) -> None:
        if next(registered) > most:
            raise SourceRefused(
                f"config.json asks for more than {most:,} parameters to be kept apart, and the weights hold {tensors:,}"
            )

    watching = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except SourceRefused:
        raise
    except Exception as error:
        raise SourceRefused(f"config.json describes no causal language model: {one_line(error)}") from error
    finally:
        watching.remove()


def load_model(view: Path, config: Any, device: torch.device, max_model_bytes: int, tensors: int) -> Any:
    """In the stored dtype, but in float32 on a CPU, where half precision is slow and its sums are coarse."""
    planned = plan_model(config, tensors)
    precision = torch.float32 if device.type == "cpu" else planned.dtype  # as the configuration says, or float32
    size = sum(parameter.numel() for parameter in planned.parameters()) * precision.itemsize
    if size > max_model_bytes:
        raise SourceRefused(
            f"the model of config.json takes {size:,} bytes in {str(precision).removeprefix('torch.')}, "
            f"as it is loaded on {device.type}; this worker takes at most {max_model_bytes:,}"
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
        raise_fault_of_machine(error)
        raise SourceRefused(f"the weights cannot be loaded: {one_line(error)}") from error
    # What is missing would be filled with random numbers, and their gradients published as the model's.
    if missing := sorted(loading["missing_keys"]):
        raise SourceRefused(
            f"the weights lack {len(missing)} tensors that config.json asks for, such as {missing[0]!r}"
        )
    # What is left over belongs to a larger model than the one that would be profiled under the weights' digest.
    if unexpected := sorted(loading.get("unexpected_keys") or ()):
        raise SourceRefused(
            f"the weights hold {len(unexpected)} tensors that config.json has no place for, such as {unexpected[0]!r}"
        )
    if loading.get("mismatched_keys"):
        raise SourceRefused(
            f"the weights do not have the shapes that config.json asks for: {loading['mismatched_keys']}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum(dtype=torch.float32).isfinite():  # NaN and infinity outlive a sum
            raise SourceRefused(f"the weights hold NaN or infinite numbers, in {name!r}: this checkpoint is broken")
    return model.to(device).eval()


def read_text(job: NewJob, domain: str, path: Path, tokenizer: Any) -> PackedText:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    data = job.data[domain]
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    try:
        return pack(
            path,
            field=data.field,
            # By the name that the job gives: a cached file's own is its digest.
            text_format=data.format or format_of(data.source),
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


def check_fit(model: Any, job: NewJob, packed: dict[str, PackedText]) -> None:
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


def batches_of(
    sequences: list[list[int]], size: int, numbers: Iterable[int], device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The batches of those numbers, each with its number."""
    for number in numbers:
        rows = sequences[number * size : (number + 1) * size]
        longest = max(map(len, rows))
        ids = [row + [0] * (longest - len(row)) for row in rows]  # what stands in for padding is masked
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        yield (
            number,
            {
                "input_ids": torch.tensor(ids, device=device),  # (batch, sequence)
                "attention_mask": torch.tensor(mask, device=device),
            },
        )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or "no message"
