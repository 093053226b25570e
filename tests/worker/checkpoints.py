"""Makes a tiny checkpoint with its own tokenizer, as `save_pretrained` writes it, and texts to profile it on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["gradient", "model", "the", "of", "layer", "norm", "batch", "token", "law", "court", "def", "return", "self"]


def make_texts(folder: Path) -> None:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(60_000)]
    (folder / "general.txt").write_text("".join(lines))
    entries = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40)), "n": n}) for n in range(400)]
    (folder / "code.jsonl").write_text("\n".join(entries) + "\n")


def make_checkpoint(folder: Path, text: Path, *, seed: int = 0) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(text.read_text().splitlines()[:2_000], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
