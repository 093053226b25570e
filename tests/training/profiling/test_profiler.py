"""The profiler as a whole: what it leaves behind, what it refuses, what merges, what the document says."""

import copy
import json
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, LayerKind, Provenance
from gradient_blueprints.training.profiling import GradientProfiler, merge
from gradient_blueprints.training.profiling.capture import UncoveredParameter
from tests.training.profiling.small_models import (
    Batch,
    batch,
    batch_gradients,
    build,
    gpt2,
    llama,
    llama4,
    looped_gradients,
    mixtral,
    one_example,
    t5,
)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_a_compiled_model_is_profiled_by_the_names_of_the_model_and_a_renamed_block_is_refused() -> None:
    model = llama()
    found = []
    for each in (model, torch.compile(model, backend="aot_eager")):
        with GradientProfiler(each) as profiler:  # type: ignore[arg-type]  # the compiled one is typed as a function
            profiler.step(batch())
        found.append([(layer.id, layer.gradient_norm) for layer in profiler.blueprint("m", 1.0).layers])
    assert found[0] == found[1]
    layers: Any = model.get_submodule("model.layers")
    layers[0] = torch.compile(layers[0], backend="aot_eager")
    with pytest.raises(ConfigurationError, match=r"layers\.0\._orig_mod\.\S+: compile in place, module\.compile\(\)"):
        GradientProfiler(model)


# --- what it leaves behind


def test_flags_mode_random_state_and_gradients_are_as_before() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    model.get_parameter("transformer.ln_f.weight").requires_grad_(False)
    wte = model.get_parameter("transformer.wte.weight")
    wte.grad = torch.ones_like(wte)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with GradientProfiler(model) as profiler:
        profiler.step(batch())
        assert torch.equal(torch.rand(3), expected)  # a step does not disturb what the loop draws
        torch.rand(10)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert wte.grad is not None
    assert torch.equal(wte.grad, torch.ones_like(wte))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "wte" not in name)
    assert hooks_of(model) == 0


def test_an_exception_leaves_no_hook_behind() -> None:
    model = build("llama")
    with pytest.raises(ZeroDivisionError), GradientProfiler(model):
        raise ZeroDivisionError
    with pytest.raises(IndexError), GradientProfiler(model) as profiler:
        profiler.step({"input_ids": torch.full((2, 4), 10_000)})
    assert hooks_of(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- modes of the model


def test_a_step_in_train_mode_repeats_itself_and_differs_from_eval_mode() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    tables = []
    for mode in (True, True, False):
        with GradientProfiler(model.train(mode), seed=3) as profiler:
            profiler.step(batch())
        tables.append(profiler.table())
    assert (tables[0] == tables[1]).all()
    assert not np.allclose(tables[0], tables[2])


def test_dropout_of_a_batch_in_train_mode_does_not_depend_on_what_was_run_before_it() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    tables = []
    for keys in ((0, 1), (1, 0)):
        with GradientProfiler(model, seed=3) as profiler:
            for key in keys:
                profiler.step(batch(seed=key), key=key)
        assert profiler.one_by_one is None
        tables.append(profiler.table())
    assert (tables[0] == tables[1]).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_mixture_that_mixes_the_rows_of_examples_runs_one_by_one_and_backward_refuses_it(training: bool) -> None:
    model, values = llama4().train(training), batch(padded=False)
    with GradientProfiler(model) as profiler:
        profiler.step(values)
        assert profiler.one_by_one is not None
        assert "experts" in profiler.one_by_one
    looped = looped_gradients(model, values)
    expected = [float(torch.cat([g.flatten() for g in gradients.values()]).norm()) for gradients in looped]
    np.testing.assert_allclose(profiler.influences(), expected, rtol=1e-4)
    with GradientProfiler(model) as profiler:
        with pytest.raises(UncoveredParameter, match=r"experts.* step"):
            profiler.backward(profiler.model(**values).loss)
        assert not any(domain.records for domain in profiler.state().domains.values())
        with pytest.raises(UncoveredParameter, match="step"):
            profiler.model(**values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    values = batch()
    with GradientProfiler(model, groups="tensor") as profiler:
        profiler.step(values)
    looped = looped_gradients(model, values)
    largest = max(float(gradient.norm()) for gradient in looped[0].values())
    for index, layer in enumerate(profiler.layers):
        expected = [float(gradients[layer.id].norm()) for gradients in looped]
        np.testing.assert_allclose(profiler.table()[index], expected, rtol=0.08, atol=0.01 * largest)


def test_float16_gradients_whose_squares_overflow_are_measured() -> None:
    layer = nn.Linear(2, 2, bias=False).to(torch.float16)

    def large(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.float().sum((1, 2)) * 1_000

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layer(inputs)
            return output

    inputs = torch.ones(3, 4, 2, dtype=torch.float16)
    with GradientProfiler(Model(), loss=large) as profiler:
        profiler.step({"inputs": inputs})
    assert profiler.table()[0] == pytest.approx([8_000] * 3)  # each of 4 entries 4,000


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_activation_checkpointing_changes_nothing(architecture: str, reentrant: bool) -> None:
    model = build(architecture).train()
    tables = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        with GradientProfiler(model, groups="tensor") as profiler:
            profiler.step(batch())
        tables.append(profiler.table())
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-5)


def test_micro_batches_change_nothing() -> None:
    model = build("llama")
    tables, norms = [], []
    for size in (None, 1, 3):
        with GradientProfiler(model, groups="tensor", micro_batch=size) as profiler:
            profiler.step(batch(5))
        tables.append(profiler.table())
        norms.append(np.asarray(profiler.domain().records[0].norms))
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(norms[2], norms[0], rtol=1e-4, atol=1e-7)


def test_padding_changes_no_norm() -> None:
    model = build("llama")
    short = batch(2, 6, padded=False)
    wide: Batch = {
        "input_ids": torch.cat([short["input_ids"], torch.full((2, 4), 7)], 1),
        "attention_mask": torch.cat([torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)], 1),
    }
    tables = []
    for values in (short, wide):
        with GradientProfiler(model, groups="tensor") as profiler:
            profiler.step(values)
        tables.append(profiler.table())
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-7)


class Odd(nn.Module):
    """A transposed parameter that no rule knows, filters with their channels last, and a table without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.ParameterList([torch.randn(6, 6).t(), torch.empty(0, 6)])
        self.filters = nn.Conv2d(1, 6, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.nothing = nn.Embedding(0, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        pictures = self.filters(inputs.view(-1, 1, 2, 3)).mean((2, 3))
        output: torch.Tensor = inputs @ torch.cat([*self.turned]) + pictures
        return output


class Classifier(nn.Module):
    """Three classes of six features, through a trunk."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.trunk(inputs))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


CLASSES = {"inputs": torch.eye(4, 6), "labels": torch.tensor([0, 1, 2, 0])}


def test_batch_norm_is_refused_in_train_mode_and_measured_in_eval_mode() -> None:
    model = Classifier(nn.BatchNorm1d(6))
    before = copy.deepcopy(model.state_dict())
    with GradientProfiler(model.train()) as profiler:
        with pytest.raises(ConfigurationError, match=r"trunk .*model\.eval\(\)"):
            profiler.step(CLASSES)
        with pytest.raises(ConfigurationError, match=r"trunk .*model\.eval\(\)"):
            profiler.model(**CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.trunk.eval()
    with GradientProfiler(model) as profiler:
        assert profiler.step(CLASSES) > 0


class Counting(nn.Module):
    """Counts its calls in train mode, and has no rule, so that it is called again for each example."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return inputs @ self.mix


def test_buffers_that_train_mode_changes_are_as_before_but_for_the_callers_own_pass() -> None:
    trunk = Counting()
    model = Classifier(trunk).train()
    with GradientProfiler(model) as profiler:
        profiler.step(CLASSES)
        assert trunk.calls == 0
        profiler.backward(model(**CLASSES).loss)
        assert trunk.calls == 1
    model = Classifier(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))).train()
    before = copy.deepcopy(model.state_dict())
    with GradientProfiler(model) as profiler:
        profiler.step(CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_fails_on_several_examples_runs_one_by_one_and_a_faulty_batch_changes_nothing() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 4}
    swin = hf.SwinForImageClassification(hf.SwinConfig(image_size=16, patch_size=2, num_labels=3, **sizes)).eval()
    values = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    tables = []
    for size in (None, 1):
        with GradientProfiler(swin, micro_batch=size) as profiler:
            profiler.step(values)
        assert (profiler.one_by_one or "").startswith("Several examples at once fail") == (size is None)
        tables.append(profiler.table())
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-5)
    with GradientProfiler(Classifier(nn.Tanh())) as profiler:
        profiler.step(CLASSES)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            profiler.step(CLASSES | {"inputs": torch.eye(4, 7)})
        assert profiler.one_by_one is None


@pytest.mark.parametrize("sums", ["host", "device", "folder"])
def test_parameters_of_other_strides_are_measured_and_those_without_entries_are_no_layers(
    sums: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Classifier(Odd()).eval()
    measured = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    mean = torch.autograd.grad(model(**CLASSES).loss, [*measured.values()])
    with GradientProfiler(model, groups="tensor", sums=tmp_path if sums == "folder" else sums) as profiler:
        profiler.step(CLASSES)
        profiler.step(CLASSES)
    layers = profiler.blueprint("m", 1.0).layers
    assert [layer.id for layer in layers] == [*measured]
    for layer, gradient in zip(layers, mean, strict=True):
        assert layer.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
        torch.testing.assert_close(profiler.domain().sums[layer.id], 8 * gradient, rtol=1e-4, atol=1e-6)


# --- the caller's own forward pass


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_backward_of_the_callers_loss_measures_what_step_does(architecture: str) -> None:
    model = build(architecture)
    values = batch()
    with GradientProfiler(model) as stepped:
        stepped.step(values)
    with GradientProfiler(model) as profiler:
        loss = model(**values).loss
        assert profiler.backward(loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_allclose(profiler.table(), stepped.table(), rtol=1e-3, atol=1e-6)
    one, two = profiler.domain().records[0], stepped.domain().records[0]
    assert one.norms is not None
    assert two.norms is not None
    np.testing.assert_allclose(one.norms, two.norms, rtol=1e-3, atol=1e-6)


def test_backward_refuses_another_loss_and_models_that_run_one_by_one() -> None:
    model = build("llama")
    with GradientProfiler(model) as profiler:
        with pytest.raises(ConfigurationError, match="Call the model"):
            profiler.backward(torch.zeros((), requires_grad=True))
        with pytest.raises(ConfigurationError, match="token mean"):
            profiler.backward(3 * model(**batch()).loss)
    with GradientProfiler(t5().eval()) as profiler, pytest.raises(UncoveredParameter, match="step"):
        profiler.model(**batch())


class Marked(nn.Module):
    """The gradient of its marker is of the examples with the token 5 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.marker = build("llama"), nn.Parameter(torch.randn(16))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        embeddings = self.inner.get_submodule("model.embed_tokens")(input_ids)
        if bool((input_ids == 5).any()):
            embeddings = torch.where((input_ids == 5)[..., None], self.marker, embeddings)
        return self.inner(inputs_embeds=embeddings, labels=labels)


def test_backward_refuses_a_parameter_without_a_rule_as_soon_as_an_example_uses_it() -> None:
    ids = torch.randint(6, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    marked = ids.clone()
    marked[2, 3] = 5
    model = Marked().eval()
    with GradientProfiler(model) as profiler:
        profiler.backward(model(input_ids=ids, labels=ids).loss)
        with pytest.raises(UncoveredParameter, match="marker"):
            profiler.backward(model(input_ids=marked, labels=marked).loss)
        profiler.step({"input_ids": marked, "labels": marked})
    row = [layer.id for layer in profiler.layers].index("marker")
    assert (profiler.table()[row] > 0).tolist() == [False] * 6 + [True, False]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Dearer(nn.Module):
    """Its loss is one part in two hundred above the mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = self.inner(input_ids=input_ids, labels=labels)
        if outputs.loss is not None:
            outputs.loss = 1.005 * outputs.loss
        return outputs


def test_losses_a_little_beside_the_mean_cross_entropy_are_refused() -> None:
    ids = batch(padded=False)["input_ids"]
    with GradientProfiler(Dearer()) as profiler, pytest.raises(ConfigurationError, match="not the mean cross-entropy"):
        profiler.step({"input_ids": ids})
    with GradientProfiler(build("llama")) as profiler, pytest.raises(ConfigurationError, match="token mean"):
        profiler.backward(1.005 * profiler.model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("weight", [0.001, 0.02])
def test_an_auxiliary_loss_of_routers_is_refused_until_it_is_switched_off(weight: float) -> None:
    model = mixtral(output_router_logits=True, router_aux_loss_coef=weight).eval()
    values = batch(2, padded=False)
    with GradientProfiler(model) as profiler:
        with pytest.raises(ConfigurationError, match=r"not the mean cross-entropy.*output_router_logits = False"):
            profiler.step(values)
        with pytest.raises(ConfigurationError, match="output_router_logits"):
            profiler.model(**values)
        config: Any = model.config
        config.output_router_logits = False
        assert profiler.step(values) > 0


# --- statistics


def test_signal_and_spread_are_the_unbiased_ones() -> None:
    model = build("llama")
    batches = [batch(3, padded=False, seed=seed) for seed in range(4)]
    with GradientProfiler(model, groups="tensor") as profiler:
        for values in batches:
            profiler.step(values)
    blueprint = profiler.blueprint("tiny", 0.5)
    gradients = [g for values in batches for g in looped_gradients(model, values)]
    n = len(gradients)
    for layer in blueprint.layers:
        each = torch.stack([g[layer.id].flatten() for g in gradients])
        squared = float((each.sum(0).square().sum() - each.square().sum()) / (n * (n - 1)))
        assert layer.signal == pytest.approx(max(0, squared) ** 0.5, rel=1e-2, abs=1e-5)
        assert layer.spread == pytest.approx(float(each.var(0, unbiased=True).sum()), rel=1e-3, abs=1e-9)
        assert layer.example_norm == pytest.approx(float(each.norm(dim=1).mean()), rel=1e-4, abs=1e-7)


def test_first_order_is_the_mean_over_all_splits_into_halves() -> None:
    model = build("llama")
    batches = [batch(2, padded=False, seed=seed) for seed in range(4)]
    with GradientProfiler(model, groups="tensor") as profiler:
        for values in batches:
            profiler.step(values)
    blueprint = profiler.blueprint("tiny", 0.5)
    gradients = [batch_gradients(model, values) for values in batches]
    for layer in blueprint.layers:
        each = torch.stack([g[layer.id].flatten() for g in gradients])
        root = each.square().mean(0).sqrt()
        products = []
        for half in combinations(range(4), 2):
            other = [index for index in range(4) if index not in half]
            product = each[list(half)].mean(0) * each[other].mean(0)
            products.append(float((product / root)[root > 1e-9].sum()))
        assert layer.first_order == pytest.approx(np.mean(products), rel=1e-3, abs=1e-4)


def test_a_general_domain_of_which_every_batch_is_left_out_takes_nothing_from_the_others() -> None:
    model = build("llama")
    nowhere = {**batch(2, padded=False), "labels": torch.full_like(batch(2, padded=False)["input_ids"], -100)}
    found = []
    for interrupted in (False, True):
        with GradientProfiler(model) as profiler:
            profiler.step(batch(2, padded=False, seed=1), domain="code")
            if interrupted:
                profiler.step(nowhere)
            profiler.step(batch(2, padded=False, seed=2), domain="code")
        found.append(profiler.blueprint("tiny", 0.5).layers)
    assert found[0] == found[1]


def test_a_general_domain_that_is_named_afterwards_has_first_order_of_all_its_batches_or_none() -> None:
    model = build("llama")

    def measured(domains: list[str], **options: Any) -> GradientProfiler:
        with GradientProfiler(model, **options) as profiler:
            for index, domain in enumerate(domains):
                profiler.step(batch(2, padded=False, seed=index), domain, key=index)
        return profiler

    def first_order(*profilers: GradientProfiler) -> list[float | None]:
        gathered = GradientProfiler(model, general="code")
        gathered.absorb(*(profiler.state() for profiler in profilers))
        return [layer.first_order for layer in gathered.blueprint("tiny", 0.5).layers]

    work = ["code", "general", "code", "code"]
    expected = [layer.first_order for layer in measured(work, general="code").blueprint("tiny", 0.5).layers]
    assert None not in expected
    assert first_order(measured(work, general="code")) == expected
    unknown = [None] * len(expected)
    assert first_order(measured(work)) == unknown  # "general" came up, and squares of code were kept no longer
    assert first_order(measured(["code", "code"]), measured(["bio"] * 2 + ["code"], general="bio")) == unknown


def test_squares_of_some_batches_are_not_kept() -> None:
    states = []
    for start, domains in enumerate((["code", "general", "code"], ["code"])):
        with GradientProfiler(build("llama")) as profiler:
            for index, domain in enumerate(domains):
                profiler.step(batch(2, padded=False, seed=index), domain, key=f"{start} {index}")
        states.append(profiler.state())
    for state in (states[0], merge(states), merge(reversed(states))):
        assert (state.domains["code"].squared, state.domains["code"].squares) == (0, {})
        assert state.domains["general"].squared == 1
        assert state.domains["general"].squares.keys() == state.domains["general"].sums.keys()
    assert states[1].domains["code"].squares


@pytest.mark.parametrize("verify", [True, False])
def test_a_first_example_without_targets_changes_nothing_of_the_others(verify: bool) -> None:
    model, values = build("bert"), batch(4)
    labels = values["labels"].clone()
    labels[0] = -100
    found = []
    for stream in (
        [{name: value[1:] for name, value in values.items()}],
        [values | {"labels": torch.full_like(labels, -100)}, values | {"labels": labels}],
    ):
        with GradientProfiler(model, verify=verify) as profiler:
            for one in stream:
                profiler.step(one)
        found.append(profiler)
    alone, together = (next(iter(profiler.domain().records.values())) for profiler in found)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(together.example_squares, alone.example_squares, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(np.asarray(together.norms), np.asarray(alone.norms), rtol=1e-3, atol=1e-7)


def test_rules_are_held_against_an_example_with_a_target() -> None:
    values = batch(3)
    values["labels"][0] = -100
    with GradientProfiler(build("bert")) as profiler:
        gradients = profiler._gradients
        assert gradients is not None
        profiler.step(values)
        assert max(float(square) for square in gradients._reference.values()) > 0


def test_factors_are_row_and_column_means_of_the_second_moment(tmp_path: Path) -> None:
    model = build("gpt2")
    batches = [batch(2, padded=False, seed=seed) for seed in range(3)]
    with GradientProfiler(model) as profiler:
        for values in batches:
            profiler.step(values, domain="code")
    path = profiler.save_factors(tmp_path / "factors.safetensors")
    gradients = [batch_gradients(model, values) for values in batches]
    with safe_open(path, "pt") as file:
        for name, _ in model.named_parameters():
            moment = torch.stack([g[name] for g in gradients]).square().mean(0)
            row = file.get_tensor(f"code/{name}/row")
            expected = moment.mean(-1) if moment.dim() > 1 else moment
            torch.testing.assert_close(row.double(), expected, rtol=1e-3, atol=1e-12)
            if moment.dim() > 1:
                column = file.get_tensor(f"code/{name}/column")
                torch.testing.assert_close(column.double(), moment.mean(-2), rtol=1e-3, atol=1e-12)
        assert json.loads(file.metadata()["gradient_blueprints"]) == {"code": {"batches": 3, "examples": 6}}


def test_the_document_holds_what_was_run() -> None:
    model = build("qwen2")
    with GradientProfiler(model, seed=7) as profiler:
        for index in range(3):
            profiler.step(batch(4, 12, padded=False, seed=index))
            profiler.step(batch(4, 12, padded=False, seed=10 + index), domain="bio")
    blueprint = profiler.blueprint("org/tiny", 0.8, Provenance(notes="a test", data={"bio": {"source": "random"}}))
    assert Blueprint.from_json(blueprint.to_json()) == blueprint
    provenance = blueprint.provenance
    assert provenance is not None
    assert (provenance.batches, provenance.batch_size, provenance.examples, provenance.tokens) == (6, 4, 24, 24 * 11)
    assert (provenance.seed, provenance.dtype, provenance.notes) == (7, "float32", "a test")
    with torch.no_grad():
        losses = [float(model(**batch(4, 12, padded=False, seed=index)).loss) for index in range(3)]
    assert provenance.loss is not None
    assert provenance.loss["general"] == pytest.approx(np.mean(losses), rel=1e-4)
    layer = blueprint.layer("model.layers.1.mlp")
    assert (layer.kind, layer.depth, layer.parameters) == (LayerKind.FEED_FORWARD, 1, 3 * 16 * 24)
    assert layer.gradient_norm_ci is not None
    assert layer.gradient_norm_ci[0] <= layer.gradient_norm <= layer.gradient_norm_ci[1]
    assert set(layer.domain_norms or {}) == {"general", "bio"}
    assert layer.alpha is not None
    assert layer.gamma == pytest.approx(1 / (1 + layer.alpha), rel=1e-5)
    assert blueprint.to_csv()


def test_median_is_the_median_of_the_batches() -> None:
    with GradientProfiler(build("llama"), statistic="median") as profiler:
        for seed in range(3):
            profiler.step(batch(seed=seed))
    norms = [record.norms for record in profiler.domain().records.values()]
    expected = np.median(np.stack([row for row in norms if row is not None]), axis=0)
    found = [layer.gradient_norm for layer in profiler.blueprint("tiny", 1.0).layers]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- what cannot be used


def test_a_batch_with_a_non_finite_gradient_is_named_and_left_out() -> None:
    model = build("llama")
    with GradientProfiler(model) as profiler:
        profiler.step(batch(seed=1))
        profiler.step(batch(seed=2))
        clean = profiler.blueprint("tiny", 1.0)
    with GradientProfiler(model) as profiler:
        profiler.step(batch(seed=1), key="first")
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        with torch.no_grad():
            kept = weight[0, 0].clone()
            weight[0, 0] = float("nan")
        assert np.isnan(profiler.step(batch(seed=3), key="broken"))
        with torch.no_grad():
            weight[0, 0] = kept
        profiler.step(batch(seed=2), key="second")
    blueprint = profiler.blueprint("tiny", 1.0)
    assert blueprint.layers == clean.layers
    assert blueprint.extra is not None
    assert blueprint.extra["profile"]["skipped_batches"] == {"general": {"broken": "non-finite loss"}}  # type: ignore[index, call-overload]
    assert blueprint.provenance is not None
    assert blueprint.provenance.batches == 2


def test_a_gradient_that_overflows_behind_a_finite_loss_is_left_out() -> None:
    model = build("llama")

    def steep(outputs: Any, values: Any) -> torch.Tensor:
        flat = outputs.logits.flatten(1)[:, :5]
        return torch.sqrt(flat.sum(1) * 0)  # 0, and its derivative infinite

    with GradientProfiler(model, loss=steep, verify=False) as profiler:
        profiler.step(batch())
    assert "non-finite gradient" in profiler.domain().skipped[0]
    with pytest.raises(ConfigurationError, match="all 1 batches had non-finite"):
        profiler.blueprint("tiny", 1.0)


def test_a_broken_first_batch_does_not_slow_the_others_down() -> None:
    model = build("llama")
    weight = model.get_parameter("model.norm.weight")
    with GradientProfiler(model) as profiler:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("inf"))
        profiler.step(batch())
        with torch.no_grad():
            weight.copy_(kept)
        profiler.step(batch())
        assert profiler.one_by_one is None
    assert list(profiler.domain().skipped) == [0]


def test_misuse_is_told() -> None:
    profiler = GradientProfiler(build("llama"))
    with pytest.raises(ConfigurationError, match="as a context"):
        profiler.step(batch())
    with pytest.raises(ConfigurationError, match="no batch"):
        profiler.blueprint("tiny", 1.0)
    with profiler:
        profiler.step(batch(), key=4)
        with pytest.raises(ConfigurationError, match="measured before"):
            profiler.step(batch(), key=4)


def test_a_model_with_another_loss_must_give_it() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **rest: Any) -> Any:
            output = self.inner(input_ids=input_ids, labels=labels, **rest)
            output.loss = output.loss / 2
            return output

    with GradientProfiler(Halved()) as profiler, pytest.raises(ConfigurationError, match="pass loss="):
        profiler.step(batch())


# --- shards


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_in_any_order_give_the_document_of_one_run(shards: int) -> None:
    model = build("llama")
    work = [(domain, index) for domain in ("general", "bio") for index in range(5)]

    def run(mine: list[tuple[str, int]]) -> GradientProfiler:
        with GradientProfiler(copy.deepcopy(model)) as profiler:
            for domain, index in mine:
                profiler.step(batch(seed=index + 100 * (domain == "bio")), domain=domain, key=index)
        return profiler

    whole = run(work)
    order = Random(shards)
    order.shuffle(work)
    parts = [run(work[start::shards]).state() for start in range(shards)]
    states = []
    for _ in range(2):
        order.shuffle(parts)
        states.append(merge(parts))
    left = merge([merge(parts[:2]), *parts[2:]])
    gathered = GradientProfiler(model)
    gathered.absorb(states[0])
    expected = whole.blueprint("tiny", 1.0)
    found = gathered.blueprint("tiny", 1.0)
    for one, two in zip(found.layers, expected.layers, strict=True):
        for name, value in two.model_dump().items():
            if isinstance(value, float) and name != "signal":  # a difference of sums, zero within its rounding
                assert getattr(one, name) == pytest.approx(value, rel=2e-5, abs=1e-6), (one.id, name)
            elif isinstance(value, int | str):
                assert getattr(one, name) == value
        assert one.signal == pytest.approx(two.signal, rel=1e-3, abs=1e-3)
    for state in (states[1], left):
        for domain, part in state.domains.items():
            other = states[0].domains[domain]
            assert part.records.keys() == other.records.keys()
            for one_sum, two_sum in zip(part.histograms, other.histograms, strict=True):
                assert (one_sum.counts == two_sum.counts).all()
            for name, tensor in part.sums.items():
                torch.testing.assert_close(tensor, other.sums[name], rtol=1e-4, atol=1e-6)


def test_shards_that_overlap_or_differ_are_refused() -> None:
    states = []
    for _ in range(2):
        with GradientProfiler(build("llama")) as profiler:
            profiler.step(batch(), key=1)
        states.append(profiler.state())
    with pytest.raises(ConfigurationError, match="in two of the states"):
        merge(states)
    other = GradientProfiler(build("gpt2")).state()
    with pytest.raises(ConfigurationError, match="layers differ"):
        merge([states[0], other])


@pytest.mark.parametrize("statistics", ["batches", "examples"])
def test_batches_of_a_domain_that_were_measured_with_different_statistics_are_refused(statistics: Any) -> None:
    model = build("llama")
    with GradientProfiler(model) as everything:
        everything.step(batch(seed=1), key=1)
    with GradientProfiler(model, statistics=statistics) as norms:
        norms.step(batch(seed=2), key=2)
        norms.step(batch(seed=3), "bio")
    with pytest.raises(ConfigurationError, match=f"different statistics, all and {statistics}"):
        merge([everything.state(), norms.state()])
    other = GradientProfiler(model)
    other.absorb(norms.state())  # whatever it would measure itself
    with other, pytest.raises(ConfigurationError, match="with the same `statistics`"):
        other.step(batch(seed=4))
    norms.state().domains.pop("general")
    everything.absorb(norms.state())
    assert set(everything.state().domains) == {"general", "bio"}


# --- layers


@pytest.mark.parametrize(
    ("architecture", "layer", "kind", "depth"),
    [
        ("llama", "model.layers.1.self_attn", LayerKind.ATTENTION, 1),
        ("llama", "model.layers.0.mlp", LayerKind.FEED_FORWARD, 0),
        ("llama", "model.layers.0.input_layernorm", LayerKind.NORMALIZATION, 0),
        ("llama", "model.embed_tokens", LayerKind.EMBEDDING, None),
        ("llama", "model.norm", LayerKind.NORMALIZATION, None),
        ("untied_llama", "lm_head", LayerKind.HEAD, None),
        ("gpt2", "transformer.h.1.attn", LayerKind.ATTENTION, 1),
        ("gpt2", "transformer.h.1.ln_1", LayerKind.NORMALIZATION, 1),
        ("gpt2", "transformer.wpe", LayerKind.EMBEDDING, None),
        ("bert", "bert.encoder.layer.0.attention", LayerKind.ATTENTION, 0),
        ("bert", "bert.encoder.layer.0.output", LayerKind.FEED_FORWARD, 0),
        ("bert", "bert.embeddings.LayerNorm", LayerKind.NORMALIZATION, None),
        ("bert", "cls.predictions.transform.dense", LayerKind.HEAD, None),
        ("t5", "encoder.block.0.layer.0.SelfAttention", LayerKind.ATTENTION, 0),
        ("t5", "decoder.block.1.layer.2.DenseReluDense", LayerKind.FEED_FORWARD, 1),
        ("t5", "decoder.block.1.layer.1.layer_norm", LayerKind.NORMALIZATION, 1),
        ("mixtral", "model.layers.1.mlp", LayerKind.FEED_FORWARD, 1),
        ("qwen3", "model.layers.1.self_attn", LayerKind.ATTENTION, 1),
    ],
)
def test_layers_have_their_kind_and_depth(architecture: str, layer: str, kind: LayerKind, depth: int | None) -> None:
    model = build(architecture)
    groups = {group.id: group for group in GradientProfiler(model).layers}
    assert (groups[layer].kind, groups[layer].depth) == (kind, depth)
    assert sum(group.size for group in groups.values()) == sum(p.numel() for p in model.parameters())


def test_coarser_layers_are_the_root_sum_of_squares_of_finer_ones() -> None:
    model = build("llama")
    tables = {}
    for granularity in ("tensor", "submodule", "block"):
        with GradientProfiler(model, groups=granularity) as profiler:
            profiler.step(batch())
        tables[granularity] = {layer.id: row for layer, row in zip(profiler.layers, profiler.table(), strict=True)}
    attention = [row for name, row in tables["tensor"].items() if name.startswith("model.layers.0.self_attn.")]
    np.testing.assert_allclose(tables["submodule"]["model.layers.0.self_attn"], np.sqrt(sum(r**2 for r in attention)))
    block = [row for name, row in tables["tensor"].items() if name.startswith("model.layers.0.")]
    np.testing.assert_allclose(tables["block"]["model.layers.0"], np.sqrt(sum(r**2 for r in block)))


def test_influences_are_the_gradient_norms_of_whole_examples() -> None:
    model = build("llama")
    with GradientProfiler(model) as profiler:
        profiler.step(batch())
    looped = looped_gradients(model, batch())
    expected = [float(torch.cat([g.flatten() for g in gradients.values()]).norm()) for gradients in looped]
    np.testing.assert_allclose(profiler.influences(), expected, rtol=1e-5)
    assert profiler.domain().records[0].losses[2] == pytest.approx(
        float(model(**one_example(batch(), 2)).loss.detach()), rel=1e-5
    )


def test_llama_with_grouped_queries_and_an_unpadded_tokenizerless_batch() -> None:
    with GradientProfiler(llama().eval()) as profiler:
        assert profiler.step({"input_ids": batch(padded=False)["input_ids"]}) > 0


def test_a_layer_of_which_many_entries_have_no_gradient_gets_its_intervals() -> None:
    model = llama(vocab_size=2_000, tie_word_embeddings=False)  # rows of tokens that do not occur
    with GradientProfiler(model) as profiler:
        for seed in range(2):
            profiler.step(batch(seed=seed))
    embedding = profiler.blueprint("m", 1.0).layer("model.embed_tokens")
    assert embedding.alpha is not None
    assert embedding.alpha_ci is not None
    assert embedding.alpha_ci[0] <= embedding.alpha_ci[1]
