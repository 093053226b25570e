"""Modules that are never called, told by the source of their parents and by hooks on what is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gradient_blueprints.training.bridges.uncalled_modules import never_called
from tests.training.profiling.small_models import VOCABULARY, bart, bert, gpt2, llama, mixtral, opt, t5


def jamba() -> nn.Module:
    model: nn.Module = hf.JambaForCausalLM(
        hf.JambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
            num_experts=1,  # all modules are called by every forward
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
        )
    )
    return model


def mamba() -> nn.Module:
    settings = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    model: nn.Module = hf.MambaForCausalLM(settings)
    return model


def siglip() -> nn.Module:
    model: nn.Module = hf.SiglipVisionModel(
        hf.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    return model


def wavlm() -> nn.Module:
    model: nn.Module = hf.WavLMModel(
        hf.WavLMConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            conv_dim=(8,),
            conv_stride=(2,),
            conv_kernel=(3,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )
    return model


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, bart, opt, mixtral, jamba, mamba, siglip, wavlm])
def test_what_the_source_says_is_what_a_forward_calls(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    called = set()
    for name, module in linear_modules(model).items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    ids = torch.randint(3, VOCABULARY, (1, 9))
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if make in (t5, bart):
        inputs["decoder_input_ids"] = ids
    elif make is siglip:
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    elif make is wavlm:
        inputs = {"input_values": torch.randn(1, 200)}
    model(**inputs)
    assert {name for name in linear_modules(model) if not never_called(model, name)} == called


def test_a_class_without_a_source_counts_as_calling_its_modules() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight\n", scope)
    model = scope["Hidden"]()
    model.a = nn.Linear(2, 2)
    assert not never_called(model, "a")
