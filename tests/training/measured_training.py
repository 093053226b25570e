"""A few real training steps whose memory is measured: run as a program, one case a process.

python -m tests.training.measured_training selected
"""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.memory import peak_bytes
from gradient_blueprints.training.selection import Selection, select

CASES = ("adamw", "selected", "checkpointed")
ROWS, LENGTH, VOCABULARY = 4, 128, 8_192


def make_model(case: str, **changes: int) -> nn.Module:
    """10 M parameters: large enough for the runtime's own memory to be small beside them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False, **{**sizes, **changes})
    model: nn.Module = LlamaForCausalLM(config)
    if case == "checkpointed":
        model.activation_checkpointing_enable()  # type: ignore[operator]  # transformers carries no types
    return model


def make_batch(case: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def make_selection(case: str) -> Selection | None:
    return select(make_blueprint(make_model(case)), budget=0.1) if case == "selected" else None


def make_blueprint(model: nn.Module) -> Blueprint:
    """One layer for each tensor."""
    layers = [
        {"id": name, "gradient_norm": 1.0, "parameters": parameter.numel()}
        for name, parameter in model.named_parameters()
    ]
    return Blueprint.from_dict({"model_id": "small", "training_checkpoint": 1.0, "layers": layers})


def resident(field: str) -> int:
    """VmRSS or VmHWM, its highest so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def measure(case: str) -> dict[str, int]:
    torch.set_num_threads(1)
    selection, batch = make_selection(case), make_batch(case)
    small = make_model(case, num_hidden_layers=1)
    small(**batch).loss.backward()  # so that libraries are loaded, and what they keep for such products is there
    del small
    before = resident("VmRSS")
    model = make_model(case).train()
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])

    def train() -> None:
        if selection is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
        else:
            optimizer = SelectedAdamW(apply_selection(model, selection))
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(optimizer, SelectedAdamW):
            optimizer.close()

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    train()
    highest = resident("VmHWM") - before
    return {"allocator": weights + peak_bytes(train), "resident": highest}


if __name__ == "__main__":
    found = {}
    for case in CASES:  # each in a copy of this process that has imported everything and used nothing
        with get_context("fork").Pool(1) as pool:
            found[case] = pool.apply(measure, (case,))
    print(json.dumps(found))
