"""Small models of the common architectures, built from their configurations, and a slow, obvious oracle."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCABULARY = 61
Batch = dict[str, Tensor]


def llama(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model: nn.Module = hf.LlamaForCausalLM(hf.LlamaConfig(**(settings | changes)))
    return model


def untied_llama() -> nn.Module:
    return llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)


def gpt2(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model: nn.Module = hf.GPT2LMHeadModel(hf.GPT2Config(**(settings | changes)))
    return model


def bert() -> nn.Module:
    model: nn.Module = hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )
    return model


def t5(**changes: Any) -> nn.Module:
    model: nn.Module = hf.T5ForConditionalGeneration(
        hf.T5Config(
            **{
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": 0,
                "pad_token_id": 0,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": True,
                **changes,
            }
        )
    )
    return model


def bart(**changes: Any) -> nn.Module:
    """Falls back to its shifted input where the decoder is given neither ids nor labels."""
    model: nn.Module = hf.BartForConditionalGeneration(
        hf.BartConfig(
            **{
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "max_position_embeddings": 64,
                "init_std": 0.2,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                **changes,
            }
        )
    )
    return model


def _qwen(kind: str, **changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    model: nn.Module = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**(settings | changes)))
    return model


def qwen2() -> nn.Module:
    return _qwen("Qwen2")


def qwen3() -> nn.Module:
    return _qwen("Qwen3", head_dim=8)


def gemma() -> nn.Module:
    return _qwen("Gemma", head_dim=8)


def mixtral(**changes: Any) -> nn.Module:
    return _qwen("Mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, **changes)


def qwen3_moe() -> nn.Module:
    return _qwen("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)


def llama4() -> nn.Module:
    """Its experts are given the rows of the whole batch once for each expert, so examples do not lie apart."""
    model: nn.Module = hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            intermediate_size_mlp=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            max_position_embeddings=64,
            initializer_range=0.2,
            attention_chunk_size=32,
        )
    )
    return model


def opt() -> nn.Module:
    model: nn.Module = hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.2,
            pad_token_id=1,
        )
    )
    return model


def albert() -> nn.Module:
    """One block used for every layer."""
    model: nn.Module = hf.AlbertForMaskedLM(
        hf.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )
    return model


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "untied_llama": untied_llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "opt": opt,
    "albert": albert,
}


def build(name: str) -> nn.Module:
    """In eval mode, with norm weights and biases moved off their 1 and 0."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(examples: int = 4, length: int = 9, *, padded: bool = True, seed: int = 1) -> Batch:
    """Random ids; from the second example on the end is padding and a stretch has no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (examples, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        for example in range(1, examples):
            end = length - (2 * example) % (length - 3)
            mask[example, end:] = 0
            ids[example, end:] = 0
            labels[example, end:] = -100
            labels[example, : example % 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Rows(Dataset[dict[str, Tensor]]):
    """Sixteen unpadded examples, as trainers take them."""

    def __init__(self) -> None:
        self.values = batch(16, padded=False)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.values.items()}


def one_example(values: Mapping[str, Tensor], index: int) -> Batch:
    return {name: value[index : index + 1] for name, value in values.items()}


def _exact(model: nn.Module) -> nn.Module:
    exact = copy.deepcopy(model).double()
    select = getattr(exact, "set_experts_implementation", None)
    if callable(select):
        select("eager")  # the grouped kernels know no float64
    for parameter in exact.parameters():
        parameter.requires_grad_(True)
    return exact


def looped_gradients(model: nn.Module, values: Batch) -> list[dict[str, Tensor]]:
    """The oracle: float64, each example alone through the model's own loss and plain autograd."""
    exact = _exact(model)
    found = []
    for index in range(len(values["input_ids"])):
        exact.zero_grad(set_to_none=True)
        exact(**one_example(values, index)).loss.backward()
        found.append(
            {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in exact.named_parameters()
            }
        )
    return found


def batch_gradients(model: nn.Module, values: Batch) -> dict[str, Tensor]:
    """Float64 gradient of the model's own loss of the whole batch."""
    exact = _exact(model)
    exact(**values).loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in exact.named_parameters()
    }
