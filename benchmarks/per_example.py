"""Norms per layer and example beside the other ways to have them, on an untied model where all of them are right.

    python -m benchmarks.per_example [--rounds 3]

Opacus' ghost mode (`GradSampleModuleFastGradientClipping`), `torch.func.vmap(grad)`, and a loop over the examples with
a backward pass each. All must agree to 1e-4 of the largest norm of each tensor. Processor seconds, one thread.

The floor is a pass that finds no norm: forward, and backward to the first layer without a gradient of any weight.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from benchmarks.results import Ratio, interleaved, processor_seconds, publish, ratios
from gradient_blueprints.training.profiling import GradientProfiler

VOCABULARY, WIDTH, LAYERS, HEADS, EXAMPLES, LENGTH = 49_152, 576, 10, 9, 8, 128  # as SmolLM2-135M, a third as deep
AGREEMENT = 1e-4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_feed_forward = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # without biases: that of the keys has no gradient but rounding
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        examples, length, _ = hidden.shape
        normed = self.before_attention(hidden)
        query, key, value = (
            projection(normed).view(examples, length, HEADS, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            .transpose(1, 2)
            .reshape(examples, length, WIDTH)
        )
        hidden = hidden + self.out(mixed)
        after: Tensor = hidden + self.down(F.gelu(self.up(self.before_feed_forward(hidden))))
        return after


class Untied(nn.Module):
    """A GPT whose head is a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        places = torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1)  # Opacus wants it contiguous
        hidden = self.embedding(input_ids) + self.position(places)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each example the mean over its tokens, (examples,)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)


norm = partial(torch.linalg.vector_norm, dtype=torch.float64)  # float32 sums of a million squares are off by 2e-4


def by_a_loop(model: Untied, ids: Tensor) -> dict[str, Tensor]:
    rows = []
    for number in range(len(ids)):
        model.zero_grad(set_to_none=True)
        example = ids[number : number + 1]
        torch.autograd.backward(losses(model(example), example).sum())
        rows.append([norm(parameter.grad) for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad(set_to_none=True)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.tensor(rows).T, strict=True))


def without_norms(model: Untied, ids: Tensor) -> None:
    """`model` has no parameter that requires a gradient."""
    hidden = model.embedding.weight[ids] + model.position.weight[: ids.shape[1]]
    hidden = hidden.requires_grad_()
    for block in model.blocks:
        hidden = block(hidden)
    torch.autograd.backward(losses(model.head(model.norm(hidden)), ids).sum())


def by_vmap(model: Untied, ids: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return losses(torch.func.functional_call(model, parameters, (example[None],)), example[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    return {name: norm(gradient, dim=tuple(range(1, gradient.dim()))) for name, gradient in gradients.items()}


class Opacus:
    def __init__(self, model: Untied) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
                GradSampleModuleFastGradientClipping,
            )

            self._model = GradSampleModuleFastGradientClipping(
                model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
            )

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        torch.autograd.backward(losses(self._model(ids), ids).sum())
        found = {name: parameter._norm_sample for name, parameter in self._model._module.named_parameters()}
        self._model.zero_grad(set_to_none=True)
        return found


def check_agreement(profiler: GradientProfiler, *others: dict[str, Tensor]) -> None:
    mine = dict(zip((layer.id for layer in profiler.layers), torch.from_numpy(profiler.table()), strict=True))
    for found in others:
        if mine.keys() != found.keys():
            raise SystemExit(f"other layers: {sorted(mine.keys() ^ found.keys())}")
        for name, norms in found.items():
            apart = float((norms - mine[name]).abs().max() / mine[name].max())
            if apart > AGREEMENT:
                raise SystemExit(f"{name}: apart by {apart:.1e} of the largest norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Untied().eval()
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH))
    profiled, ghost, frozen = Untied().eval(), Untied().eval(), Untied().eval().requires_grad_(False)
    for copy in (profiled, ghost, frozen):
        copy.load_state_dict(model.state_dict())
    ghost.train()  # Opacus looks at nothing else; there is no dropout
    profiler = GradientProfiler(
        profiled,
        groups="tensor",
        statistics="examples",
        verify=False,
        digests=False,
        loss=lambda logits, batch: losses(logits, batch["labels"]),
    )
    opacus = Opacus(ghost)
    with profiler:
        profiler.step({"input_ids": ids, "labels": ids})
        check_agreement(profiler, by_a_loop(model, ids), by_vmap(model, ids), opacus(ids))
        ways: dict[str, Callable[[], object]] = {
            "profiler": partial(profiler.step, {"input_ids": ids, "labels": ids}),
            "loop": partial(by_a_loop, model, ids),
            "vmap": partial(by_vmap, model, ids),
            "opacus": partial(opacus, ids),
            "floor": partial(without_norms, frozen, ids),
        }
        found = interleaved(options.rounds, **{name: partial(processor_seconds, way) for name, way in ways.items()})
    print({name: f"{1000 * min(times):.0f} ms" for name, times in found.items()})
    work = f"norms per layer and example, times faster ({EXAMPLES} x {LENGTH} tokens)"
    publish(
        [
            Ratio(work, "Opacus' ghost mode", ratios(found, "opacus", "profiler"), 1.6, at_least=True),
            Ratio(work, "torch.func.vmap(grad)", ratios(found, "vmap", "profiler"), 3, at_least=True),
            Ratio(work, "a loop over examples", ratios(found, "loop", "profiler"), 1.5, at_least=True),
            Ratio(
                "the floor: a pass that finds no norm, times faster",
                "Opacus' ghost mode",
                ratios(found, "opacus", "floor"),
            ),
        ]
    )


if __name__ == "__main__":
    main()
