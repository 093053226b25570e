"""The two models and their texts as tokens, made once and kept in the work folder."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo import models
from evidence import texts
from evidence.texts import Part

ModelName = Literal["gpt", "gpt-series", "smollm2", "tiny"]
WORK = Path(__file__).parent / "work"
SIZES = {
    "gpt": models.GptSize(layers=8, steps=1500),
    "gpt-series": models.GptSize(layers=8, steps=1500),
    "tiny": models.GptSize(layers=2, width=32, vocabulary=300, steps=12, batch=4, length=32),  # the tests'
}
CHECKPOINTS = {"gpt": (1.0,), "gpt-series": (0.1, 0.5, 1.0), "tiny": (0.5, 1.0)}
"""Fractions of the pre-training at which its weights are kept."""
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A pre-trained model and the tokens of every domain's parts."""

    name: ModelName
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    work: Path

    def fresh(self) -> PreTrainedModel:
        """A copy of the model with its pre-trained weights."""
        return copy.deepcopy(self.model)

    def at(self, fraction: float) -> Subject:
        """The same model after a part of its pre-training, one of `CHECKPOINTS`."""
        return self if fraction == 1 else replace(self, model=_pretrained(self.name, self.work, fraction)[0])

    @cache  # noqa: B019 - a process has one subject
    def tokens(self, domain: str, part: Part) -> torch.Tensor:
        """Token ids of one part of a domain, (tokens,)."""
        path = self.work / "tokens" / self.name / f"{domain}-{part}.npy"
        if not path.is_file():
            found = models.tokenize(self.tokenizer, corpus(domain, self.work)[part]).numpy()
            _write_whole(path, lambda target: np.save(target, found))
        return torch.from_numpy(np.load(path)).long()


def load(name: ModelName, work: Path = WORK, report: Callable[[int, float], None] = lambda step, loss: None) -> Subject:
    """The model, pre-trained or converted when it is not there yet: some minutes for `gpt`, 20 s for `smollm2`."""
    folder = work / "models" / name
    if name == "smollm2":
        models.convert_smollm2(folder)
    elif not (folder / f"{name}-1").is_dir():
        english = corpus("english", work)["training"]
        for _ in models.pretrain_gpt(name, english, folder, SIZES[name], CHECKPOINTS[name], report):
            pass
    return Subject(name, *_pretrained(name, work), work)


def _pretrained(name: ModelName, work: Path, fraction: float = 1.0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = work / "models" / name
    model, tokenizer = models.load(folder if name == "smollm2" else folder / f"{name}-{fraction:g}")
    model.set_attn_implementation("eager")  # of so short sequences the fused kernel takes nearly twice as long here
    return model, tokenizer


def corpus(domain: str, work: Path = WORK) -> dict[Part, str]:
    """A domain's texts as they were when first read here: packages that are installed later change nothing."""
    path = work / "texts" / f"{domain}.json"
    if not path.is_file():
        found = texts.read(domain)
        _write_whole(path, lambda target: target.write_text(json.dumps(found)))
    parts: dict[Part, str] = json.loads(path.read_text())
    return parts


@cache
def digest(domain: str, work: Path = WORK) -> str:
    """Names the texts of a domain, since other machines have other packages."""
    return hashlib.sha256(json.dumps(corpus(domain, work), sort_keys=True).encode()).hexdigest()[:12]


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Another process never sees a part of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    write(partial)
    partial.rename(path)
