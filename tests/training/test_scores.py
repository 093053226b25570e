"""Local statistics in one pass, and the scores made of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.finetuning import apply_selection
from gradient_blueprints.training.selection import (
    LocalStatistics,
    Score,
    blended,
    empirical_bayes,
    local_gradient,
    local_rms,
    mean_gradients,
    published_factors,
    random_coordinates,
    select,
)
from gradient_blueprints.training.selection.budgets import saved_bytes
from tests.training.profiling.small_models import build


class Scorer(nn.Module):
    """A language model as `mean_gradients` sees it: input ids and labels in, a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 7)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> object:
        logits = self.head(self.dropout(self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return type("Output", (), {"loss": loss})()


class HeldBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Follows the memory of the tensors that operations make while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if (storage := tensor.untyped_storage())._cdata not in given:
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._held = {key: (held, size) for key, (held, size) in self._held.items() if not held.expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return made


class WideEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200_000, 64)
        self.nothing = nn.Parameter(torch.empty(0, 64))  # as a table of no added tokens

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
        return type("Output", (), {"loss": self.embedding(input_ids).square().mean() + self.nothing.sum()})()


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 1.0), (torch.bfloat16, 0.5)])
def test_a_sample_and_the_scores_made_of_it_need_no_room_for_a_second_gradient(dtype: torch.dtype, kept: float) -> None:
    """Of an embedding, which is the largest tensor: with it a training of a few coordinates has its peak here."""
    model = WideEmbedding()
    gradient = 4 * model.embedding.weight.numel()
    batches = [{"input_ids": torch.randint(0, 200_000, (4, 100))} for _ in range(3)]
    with HeldBytes() as gathering:
        statistics = LocalStatistics.gather(model, batches, dtype=dtype)
    assert 1 + kept <= gathering.peak / gradient < 1.15 + kept
    scores = empirical_bayes(statistics.factors(), statistics)
    tracemalloc.start()
    with HeldBytes() as ranking:
        assert scores("embedding.weight", (200_000, 64)) is not None
    of_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ranking.peak < 0.2 * gradient
    assert gradient <= of_numpy < 1.1 * gradient  # the scores themselves


def test_mean_gradients_are_the_mean_of_the_batches_without_dropout_or_padding() -> None:
    torch.manual_seed(0)
    model = Scorer().train()
    ids = torch.randint(0, 7, (2, 3, 5))
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 2:] = 0
    found = mean_gradients(model, [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1]}])
    assert model.training
    assert model.head.weight.grad is None
    model.eval()
    losses = model(ids[0], ids[0].masked_fill(mask == 0, -100)).loss, model(ids[1], ids[1]).loss
    expected = torch.autograd.grad((losses[0] + losses[1]) / 2, list(model.parameters()))
    for gradient, (name, _) in zip(expected, model.named_parameters(), strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_padding_on_the_left_changes_no_mean_gradient() -> None:
    model, row = build("llama"), torch.tensor([[5, 7, 11, 13, 17]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], 1)
    found = mean_gradients(model, [{"input_ids": padded, "attention_mask": (padded > 0).long()}])
    for name, gradient in mean_gradients(model, [{"input_ids": row}]).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def batches_of(count: int, examples: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 7, (examples, 5), generator=generator)} for _ in range(count)]


def gradients_by_batch(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    return [
        dict(
            zip(
                names,
                torch.autograd.grad(model(batch["input_ids"], batch["input_ids"]).loss, list(model.parameters())),
                strict=True,
            )
        )
        for batch in batches
    ]


def test_one_pass_gives_mean_square_factors_and_the_noise_of_the_mean() -> None:
    torch.manual_seed(0)
    model, batches = Scorer(), batches_of(5)
    found = LocalStatistics.gather(model, batches)
    squares = LocalStatistics.gather(model, batches, keep="square")
    stacked = gradients_by_batch(model, batches)
    assert (found.batches, found.sequences) == (5, 15)
    assert not found.square
    assert not squares.mean
    assert not LocalStatistics.gather(model, batches, keep="factors").mean
    for name in found.mean:
        gradients = torch.stack([gradient[name] for gradient in stacked])
        torch.testing.assert_close(found.mean[name], gradients.mean(0))
        torch.testing.assert_close(squares.square[name], gradients.square().mean(0))
        variance = gradients.var(0) / 5  # of the mean
        noise = found.noise(name)
        assert noise is not None
        dimensions = {"row": -1, "column": -2} if variance.dim() > 1 else {}
        for side, dimension in dimensions.items():
            torch.testing.assert_close(noise[side], variance.mean(dimension), rtol=1e-3, atol=1e-9)
        if variance.dim() == 1:
            torch.testing.assert_close(noise["row"], variance, rtol=1e-3, atol=1e-9)


def test_a_sample_may_be_an_iterator() -> None:
    model, batches = Scorer(), batches_of(3)
    for name, mean in mean_gradients(model, batches).items():
        assert torch.equal(mean, mean_gradients(model, iter(batches))[name])


def test_half_the_memory_is_right_on_average() -> None:
    """Rounded to the nearest, the sum of 200 equal parts would stop growing."""
    torch.manual_seed(0)
    model, batches = Scorer(), batches_of(1) * 200
    exact = LocalStatistics.gather(model, batches[:1]).mean
    halved = LocalStatistics.gather(model, batches, dtype=torch.bfloat16).mean
    for name, expected in exact.items():
        assert halved[name].dtype == torch.bfloat16
        torch.testing.assert_close(halved[name].float(), expected, rtol=0.1, atol=1e-3)
    with pytest.raises(ConfigurationError, match="bfloat16"):
        LocalStatistics.gather(model, batches, dtype=torch.float16)


def test_what_an_earlier_selection_froze_is_measured_for_the_next_and_what_its_owner_froze_is_not() -> None:
    model, batches = Scorer(), batches_of(2)
    model.head.bias.requires_grad_(False)
    whole = mean_gradients(model, batches)
    layers = [{"id": name, "gradient_norm": norm} for name, norm in (("embedding", 1.0), ("head", 2.0))]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    apply_selection(model, select(blueprint, budget=0.5, unit="layer", model=model))
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert required == {"embedding.weight": False, "head.weight": True, "head.bias": False}
    found = mean_gradients(model, batches)
    assert found.keys() == whole.keys() == {"embedding.weight", "head.weight"}
    for name, mean in whole.items():
        assert torch.equal(found[name], mean)
    assert select(blueprint, gradients=found, model=model).random_tensors == 0
    with pytest.raises(TypeError, match="input_ids"):
        mean_gradients(model, [*batches, {}])
    assert required == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


class Elsewhere(torch.Tensor):
    """Refused by the embedding until it is moved, as if it were on another device."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.embedding:
            raise RuntimeError("indices and weights are on different devices")
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # no types
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.to else result


def elsewhere_of(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{name: value.as_subclass(Elsewhere) for name, value in batch.items()} for batch in batches]


def test_a_budget_is_measured_on_the_models_device() -> None:
    model, batches = Scorer(), batches_of(1)
    assert sum(saved_bytes(model, elsewhere_of(batches)[0])) == sum(saved_bytes(model, batches[0])) > 0


def test_batches_are_moved_to_the_models_device() -> None:
    model, batches = Scorer(), batches_of(2)
    elsewhere = elsewhere_of(batches)
    found = mean_gradients(model, elsewhere)
    for name, mean in mean_gradients(model, batches).items():
        assert torch.equal(found[name], mean)


def test_a_sample_that_measures_nothing_is_refused() -> None:
    used_up = iter(batches_of(2))
    list(used_up)
    with pytest.raises(ConfigurationError, match="used up"):
        LocalStatistics.gather(Scorer(), used_up)
    with pytest.raises(ConfigurationError, match="mean, square, factors"):
        LocalStatistics.gather(Scorer(), batches_of(2), keep="means")  # type: ignore[arg-type]
    offloaded = Scorer()
    cpu_offload(offloaded, torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="offloaded"):
        LocalStatistics.gather(offloaded, batches_of(2))


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, bos_token_id=0, intermediate_size=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, bos_token_id=0, n_inner=32)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, bos_token_id=0, ffn_dim=32, word_embed_proj_dim=16)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpointed_model_is_measured_with_checkpointing_and_to_the_same_bit(kind: str) -> None:
    """OPT's layers drop out by their own mode, GPT-2 hands each layer its cache."""
    torch.manual_seed(0)
    model, batches = MODELS[kind]().train(), batches_of(2)
    expected = mean_gradients(model, batches)
    model.activation_checkpointing_enable()
    inner = next(module for name, module in model.named_modules() if name.endswith(("0.mlp", "0.fc1")))
    calls: list[tuple[bool, bool]] = []
    inner.register_forward_pre_hook(lambda module, inputs: calls.append((module.training, model.config.use_cache)))
    found = mean_gradients(model, batches)
    assert calls == [(False, False)] * 4  # twice a batch, the second time for the backward pass
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert found.keys() == expected.keys()
    for name, mean in expected.items():
        assert torch.equal(found[name], mean)
    calls.clear()
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert calls == [(True, True)] * 2


def test_a_model_is_measured_without_the_states_that_it_would_keep_for_the_next_token() -> None:
    """RWKV writes into its state what its backward pass needs."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=64)
    model, batches = RwkvForCausalLM(config).eval(), batches_of(1)
    found = mean_gradients(model, batches)
    model(**batches[0], labels=batches[0]["input_ids"], use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad)


def test_a_model_without_a_loss_is_refused() -> None:
    config = LlamaConfig(**SMALL, bos_token_id=0, intermediate_size=32)
    model: nn.Module = LlamaForCausalLM(config).model
    with pytest.raises(ConfigurationError, match="LlamaModel gives no loss for a batch of input_ids"):
        mean_gradients(model, batches_of(1))


def test_a_model_that_holds_gradients_is_refused() -> None:
    model = Scorer()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with pytest.raises(ConfigurationError, match="zero_grad"):
        mean_gradients(model, batches_of(1))


# --- scores

SHAPE = (30, 40)


def factors_of(values: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    return {"w": {"row": values.mean(1), "column": values.mean(0)}}


def sample(truth: torch.Tensor, noise: torch.Tensor, batches: int, seed: int = 0) -> LocalStatistics:
    """What `gather` would find: batch gradients of mean `truth` and standard deviation `noise`."""
    generator = torch.Generator().manual_seed(seed)
    found = LocalStatistics(batches=batches, sequences=batches)
    drawn = truth + noise * torch.randn(batches, *SHAPE, generator=generator)
    found.mean["w"] = drawn.mean(0)
    found.row["w"] = drawn.square().mean(2).sum(0)
    found.column["w"] = drawn.square().mean(1).sum(0)
    return found


def correlation(left: np.ndarray | None, right: torch.Tensor) -> float:
    assert left is not None
    return float(np.corrcoef(left, right.flatten().numpy())[0, 1])


@pytest.fixture(scope="module")
def prior() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.outer(torch.rand(30, generator=generator), torch.rand(40, generator=generator)) ** 2


@pytest.fixture(scope="module")
def truth(prior: torch.Tensor) -> torch.Tensor:
    return prior.sqrt() * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def test_without_a_local_sample_the_score_is_the_factors_and_with_ever_more_the_local_gradient(
    prior: torch.Tensor, truth: torch.Tensor
) -> None:
    factors = factors_of(prior)
    alone = empirical_bayes(factors, LocalStatistics())("w", SHAPE)
    published = published_factors(factors)("w", SHAPE)
    assert alone is not None
    assert published is not None
    assert np.array_equal(alone, published)
    statistics = sample(truth, torch.full(SHAPE, 0.3), 20_000)
    assert correlation(empirical_bayes(factors, statistics)("w", SHAPE), statistics.mean["w"].abs()) > 0.9999


def test_the_score_is_the_expected_square_of_the_mean_gradient(prior: torch.Tensor, truth: torch.Tensor) -> None:
    statistics = sample(truth, torch.full(SHAPE, 0.5), 16)
    score = empirical_bayes(factors_of(prior), statistics)("w", SHAPE)
    noise = statistics.noise("w")
    assert score is not None
    assert noise is not None
    variance = torch.outer(noise["row"], noise["column"]) / noise["row"].mean()
    mean = statistics.mean["w"]
    moment = torch.outer(prior.mean(1), prior.mean(0)) / prior.mean()
    signal = (mean.square().mean() - variance.mean()) / moment.mean() * moment
    weight = signal / (signal + variance)
    expected = ((weight * mean) ** 2 + weight * variance).sqrt().flatten().numpy()
    np.testing.assert_allclose(score, expected, rtol=1e-3)


@pytest.mark.parametrize("batches", [2, 8, 32, 128])
def test_with_a_right_prior_it_finds_more_of_the_gradient_than_either_side_alone(
    prior: torch.Tensor, truth: torch.Tensor, batches: int
) -> None:
    """Mass of the true mean gradient within the best tenth, over 20 samples."""

    def found(score: Score) -> float:
        scores = score("w", SHAPE)
        assert scores is not None
        return float(truth.abs().flatten()[torch.from_numpy(scores).topk(120).indices].sum())

    both = published = local = 0.0
    for seed in range(20):
        statistics = sample(truth, torch.full(SHAPE, 1.0), batches, seed)
        both += found(empirical_bayes(factors_of(prior), statistics))
        published += found(published_factors(factors_of(prior)))
        local += found(local_gradient(statistics.mean))
    assert both > max(published, local)


def wrong_factors(prior: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    return factors_of(prior.flip(0, 1))


def test_factors_that_do_not_fit_the_sample_have_no_say(prior: torch.Tensor, truth: torch.Tensor) -> None:
    for batches in (4, 8, 32):
        statistics = sample(truth, torch.full(SHAPE, 0.3), batches)
        alone = empirical_bayes({}, statistics)("w", SHAPE)
        np.testing.assert_array_equal(empirical_bayes(wrong_factors(prior), statistics)("w", SHAPE), alone)
        believed = empirical_bayes(wrong_factors(prior), statistics, trust=1.0)("w", SHAPE)
        assert correlation(alone, truth.abs()) > correlation(believed, truth.abs())


def test_factors_that_fit_are_believed(prior: torch.Tensor, truth: torch.Tensor) -> None:
    for batches in (2, 8, 32):
        statistics = sample(truth, torch.full(SHAPE, 0.5), batches)
        believed = empirical_bayes(factors_of(prior), statistics, trust=1.0)("w", SHAPE)
        np.testing.assert_array_equal(empirical_bayes(factors_of(prior), statistics)("w", SHAPE), believed)


def test_a_million_coordinates_judge_factors_as_all_do() -> None:
    shape = (1500, 1400)
    generator = torch.Generator().manual_seed(3)
    prior = torch.outer(torch.rand(1500, generator=generator), torch.rand(1400, generator=generator)) ** 2
    truth = prior.sqrt() * torch.randn(shape, generator=generator)
    statistics = LocalStatistics(batches=4, sequences=4)
    drawn = truth + 0.3 * torch.randn(4, *shape, generator=generator)
    statistics.mean["w"] = drawn.mean(0)
    statistics.row["w"], statistics.column["w"] = drawn.square().mean(2).sum(0), drawn.square().mean(1).sum(0)
    for factors, trust in ((factors_of(prior), 1.0), (wrong_factors(prior), 0.0)):
        chosen = empirical_bayes(factors, statistics)("w", shape)
        np.testing.assert_array_equal(chosen, empirical_bayes(factors, statistics, trust=trust)("w", shape))


class Watched(dict[str, torch.Tensor]):
    """Notes whose tensors are looked up."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def items(self) -> Any:
        self.read.update(self)
        return super().items()


def test_the_score_of_a_tensor_reads_the_sums_of_no_other(truth: torch.Tensor) -> None:
    """Else a model of thousands of tensors takes the square of their number."""
    statistics = sample(truth, torch.full(SHAPE, 0.3), 4)
    row = statistics.row = Watched({"w": statistics.row["w"], "other": torch.ones(3)})
    column = statistics.column = Watched({"w": statistics.column["w"], "other": torch.ones(2)})
    empirical_bayes({}, statistics)("w", SHAPE)
    assert row.read == column.read == {"w"}


def test_trust_and_validity_weigh_the_factors_against_the_sample(prior: torch.Tensor, truth: torch.Tensor) -> None:
    statistics = sample(truth, torch.full(SHAPE, 0.3), 8)
    wrong = wrong_factors(prior)

    def right(validity: float, trust: float | None) -> float:
        return correlation(empirical_bayes(wrong, statistics, validity, trust)("w", SHAPE), truth.abs())

    assert right(1.0, 0.0) > right(1.0, 0.5) > right(1.0, 1.0) + 0.01
    assert right(0.5, 1.0) == right(1.0, 0.5)
    without = empirical_bayes({}, statistics)("w", SHAPE)
    np.testing.assert_array_equal(empirical_bayes(wrong, statistics, validity=0.0)("w", SHAPE), without)


def test_factors_of_zeros_choose_nothing_when_they_are_believed(truth: torch.Tensor) -> None:
    statistics = sample(truth, torch.full(SHAPE, 0.3), 8)
    score = empirical_bayes(factors_of(torch.zeros(SHAPE)), statistics, trust=1.0)("w", SHAPE)
    assert score is not None
    assert not score.any()


def test_a_sample_without_any_signal_leaves_the_prior_to_rank(prior: torch.Tensor) -> None:
    statistics = sample(torch.zeros(SHAPE), torch.full(SHAPE, 1.0), 4)
    score = empirical_bayes(factors_of(prior), statistics)("w", SHAPE)
    published = published_factors(factors_of(prior))("w", SHAPE)
    assert published is not None
    assert correlation(score, torch.from_numpy(published)) > 0.9


def test_blends_are_of_shares_and_a_part_that_knows_nothing_has_no_say() -> None:
    left: Score = lambda name, shape: np.array([1, 3], np.float32)  # noqa: E731 - a score is any function
    right: Score = lambda name, shape: np.array([30, 10], np.float32)  # noqa: E731
    nothing: Score = lambda name, shape: None  # noqa: E731
    found = blended((0.5, left), (0.5, right), (9.0, nothing))("w", (2,))
    np.testing.assert_allclose(found, [0.5, 0.5])  # type: ignore[arg-type]  # two parts knew something
    assert blended((1.0, nothing))("w", (2,)) is None


BLUEPRINT = Blueprint.from_dict(
    {
        "model_id": "m",
        "training_checkpoint": 1.0,
        "layers": [{"id": "head", "gradient_norm": 1.0, "parameters": 35}],
    }
)


def test_a_function_of_name_and_shape_is_a_score() -> None:
    seen = []

    def last(name: str, shape: tuple[int, ...]) -> np.ndarray:
        seen.append((name, shape))
        return np.arange(np.prod(shape), dtype=np.float32)

    selection = select(BLUEPRINT, budget=0.2, score=last, model=Scorer())
    assert seen == [("head.weight", (7, 4)), ("head.bias", (7,))]  # the largest first
    assert selection.parts["head.weight"].tolist() == [23, 24, 25, 26, 27]
    assert selection.score == "last"
    with pytest.raises(ConfigurationError, match="1 values for the shape"):
        select(BLUEPRINT, score=lambda name, shape: np.ones(1, np.float32), model=Scorer())
    with pytest.raises(ConfigurationError, match="there is no score"):
        select(BLUEPRINT, score="best", model=Scorer())  # type: ignore[arg-type]  # that it is refused is the test


@pytest.mark.parametrize("name", ["mean_gradient", "rms", "local_factors", "factors", "blend", "random"])
def test_named_scores_are_the_functions_of_that_name(name: str) -> None:
    torch.manual_seed(0)
    model, batches = Scorer(), batches_of(3)
    statistics = LocalStatistics.gather(model, batches, keep="square" if name == "rms" else "mean")
    local = {
        f"code/{key}/{side}": value for key, sides in statistics.factors().items() for side, value in sides.items()
    }
    score: Score = {
        "mean_gradient": local_gradient(statistics.mean),
        "rms": local_rms(statistics),
        "local_factors": published_factors(statistics.factors()),
        "factors": published_factors(statistics.factors()),
        "blend": blended((0.5, published_factors(statistics.factors())), (0.5, local_gradient(statistics.mean))),
        "random": random_coordinates(),
    }[name]
    named = select(BLUEPRINT, budget=0.4, score=name, statistics=statistics, factors=local, model=model)  # type: ignore[arg-type]
    given = select(BLUEPRINT, budget=0.4, score=score, model=model)
    assert np.array_equal(named.parts["head.weight"], given.parts["head.weight"])
