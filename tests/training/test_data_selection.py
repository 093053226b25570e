"""Scores of examples, the predictor of Algorithm 2 and its calibration, and the index that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.data_selection import (
    ErrorNorm,
    GradientNorm,
    Loss,
    Random,
    Scores,
    Strategy,
    exact_influences,
    fit_influence,
    held_out_correlation,
    keep_top,
    select_data,
)
from gradient_blueprints.training.gradient_similarity import GradientSimilarity
from gradient_blueprints.training.ridge import STRENGTHS, Ridge, places_out_of_fold
from gradient_blueprints.training.selection import Budget, LocalStatistics
from tests.training.profiling.small_models import VOCABULARY, Batch, bart, bert, llama, t5, untied_llama

LENGTHS = (4, 12, 7, 3, 9, 12)


def padded(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Random ids, each example as long as asked for, the rest padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def padded_left(batch: Batch) -> Batch:
    """The same examples with their padding in front."""
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        name: torch.stack([row.roll(n) for row, n in zip(value, padding, strict=True)]) for name, value in batch.items()
    }


def one_by_one(model: nn.Module, batch: Batch) -> list[Batch]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{"input_ids": batch["input_ids"][i : i + 1, :length]} for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama().eval()


def test_the_index_keeps_the_best_in_the_order_of_the_data() -> None:
    scores = np.array([5.0, 1.0, np.nan, 4.0, 3.0, 2.0])
    assert keep_top(np.append(scores, np.inf), 0.3).tolist() == [0, 3]
    assert keep_top(scores, 0.5).tolist() == [0, 3, 4]
    assert keep_top(scores, 1.0).tolist() == [0, 1, 3, 4, 5]
    assert keep_top(scores, 0.34, guard=0.17).tolist() == [3, 4]
    assert keep_top(scores.tolist(), 0.5).tolist() == [0, 3, 4]


def test_scores_that_are_not_one_for_each_example_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(3, 1\)"):
        keep_top(np.ones((3, 1)), 0.5)


@pytest.mark.parametrize(("fraction", "guard"), [(0, 0), (1.1, 0), (0.5, 1)])
def test_shares_outside_their_range_are_refused(fraction: float, guard: float) -> None:
    with pytest.raises(ConfigurationError, match="share"):
        keep_top(np.ones(3), fraction, guard=guard)


@pytest.mark.parametrize(
    ("scores", "fraction", "guard"),
    [(np.arange(9.0), 0.1, 0), (np.full(9, np.nan), 0.5, 0), (np.array([1.0] + [np.nan] * 8), 0.5, 0.2)],
)
def test_an_index_that_would_be_empty_is_refused(scores: Scores, fraction: float, guard: float) -> None:
    with pytest.raises(ConfigurationError, match="keeps none of 9 examples"):
        keep_top(scores, fraction, guard=guard)


@pytest.mark.parametrize("strategy", [Loss(), GradientNorm(), Random(), GradientSimilarity((padded((6,)),))])
def test_a_stream_that_was_used_up_is_refused(model: nn.Module, strategy: Strategy) -> None:
    with pytest.raises(ConfigurationError, match="no batch"):
        select_data(model, iter([]), 0.3, strategy)


def test_a_sample_that_was_used_up_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="no batch"):
        fit_influence(model, iter([]))


def test_a_broken_example_has_no_score_and_takes_none_from_its_batch() -> None:
    torch.manual_seed(0)
    model, batch = untied_llama().eval(), padded((6,) * 4)
    batch["input_ids"].clamp_(max=50)
    whole = exact_influences(model, [batch])
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[60] = torch.inf  # type: ignore[operator]
    batch["input_ids"][2, 3] = 60
    scores = exact_influences(model, [batch])
    assert np.isnan(scores).tolist() == [False, False, True, False]
    assert scores[[0, 1, 3]] == pytest.approx(whole[[0, 1, 3]], rel=1e-4)


def test_an_unknown_preference_among_losses_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="high, low, middle"):
        Loss("hard")  # type: ignore[arg-type]


def test_the_index_works_with_datasets_and_with_a_data_loader(model: nn.Module) -> None:
    rows = [{"input_ids": row} for row in padded((6,) * 10)["input_ids"].tolist()]
    dataset = Dataset.from_list(rows).with_format("torch")
    index = select_data(model, DataLoader(dataset, batch_size=4), 0.3, Loss())
    assert len(index) == 3
    chosen = dataset.select(index)["input_ids"][:]
    again = [batch["input_ids"] for batch in DataLoader(Subset(dataset, index.tolist()), batch_size=3)]
    assert torch.equal(torch.as_tensor(chosen), again[0])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"batch_size": 4, "shuffle": True}, "shuffle=False"),
        ({"batch_sampler": BatchSampler(RandomSampler(range(10)), 4, drop_last=False)}, "shuffle=False"),
        ({"batch_sampler": [[9, 8], [7, 6]]}, "list may draw others: .* without a sampler"),
        ({"batch_size": 4, "sampler": range(9, -1, -1)}, "range may draw others: .* without a sampler"),
        ({"batch_size": 4, "sampler": LengthGroupedSampler(4, lengths=[6] * 10)}, "LengthGroupedSampler may draw"),
        ({"batch_size": 4, "sampler": DistributedSampler(range(10), 2, 0)}, "in one process"),  # type: ignore[arg-type]
        ({"batch_size": 4, "drop_last": True}, "the last 2 examples"),
    ],
)
def test_a_loader_whose_positions_are_not_the_data_sets_is_refused(
    model: nn.Module, options: dict[str, Any], what: str
) -> None:
    rows: Any = [{"input_ids": row} for row in padded((6,) * 10)["input_ids"]]
    with pytest.raises(ConfigurationError, match=what):
        select_data(model, DataLoader(rows, **options), 0.3, Loss())
    assert len(select_data(model, DataLoader(rows, batch_size=5, drop_last=True), 0.3, Loss())) == 3


def test_a_stream_is_scored_whole_and_in_its_order_or_refused(model: nn.Module) -> None:
    class Rows(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return ({"input_ids": row} for row in padded((6,) * 10)["input_ids"])

    assert len(select_data(model, DataLoader(Rows(), batch_size=4), 0.3, Loss())) == 3
    for options, what in (({"drop_last": True}, "drop_last=False"), ({"num_workers": 2}, "at most 1")):
        loader: DataLoader[Any] = DataLoader(Rows(), batch_size=4, **options)
        with pytest.raises(ConfigurationError, match=what):
            select_data(model, loader, 0.3, Loss())


# --- exact influences and rivals, against the obvious


def looped_influence(model: nn.Module, batch: Batch) -> float:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    return float(norm)


def test_exact_influences_are_those_of_a_loop_of_backward_passes(model: nn.Module) -> None:
    batch = padded(LENGTHS)
    wanted = np.array([looped_influence(model, one) for one in one_by_one(model, batch)])
    assert exact_influences(model, [batch]) == pytest.approx(wanted, rel=1e-4)
    by_length = exact_influences(model, [batch], length_normalised=True)
    assert by_length == pytest.approx(wanted * np.sqrt(np.array(LENGTHS) - 1), rel=1e-4)


def test_an_example_without_targets_has_no_score_and_shifts_no_other(model: nn.Module) -> None:
    batch = padded(LENGTHS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[2] = -100
    silent = batch | {"labels": labels}
    for strategy in (Loss(), ErrorNorm(), GradientNorm(), Loss("middle"), Random()):
        scores = strategy(model, [batch, silent])
        assert np.flatnonzero(np.isnan(scores)).tolist() == [8]
        if strategy not in (Loss("middle"), Random()):
            assert scores[[6, 7, 9, 10, 11]] == pytest.approx(scores[[0, 1, 3, 4, 5]], rel=1e-4)
    assert 8 not in select_data(model, [batch, silent], 1.0, Loss())


@pytest.mark.parametrize("strategy", [Loss(), ErrorNorm(), GradientNorm()])
def test_padding_on_the_left_changes_no_score(model: nn.Module, strategy: Strategy) -> None:
    batch = padded(LENGTHS)
    assert strategy(model, [padded_left(batch)]) == pytest.approx(strategy(model, [batch]), rel=1e-3)


def test_a_target_after_padding_counts_where_labels_are_not_shifted() -> None:
    torch.manual_seed(0)
    masked, batch = bert().eval(), padded_left(padded((4, 6)))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert Loss()(masked, [batch]).tolist() == Loss()(masked, [batch | {"labels": labels}]).tolist()


def test_given_labels_after_padding_count(model: nn.Module) -> None:
    batch = padded_left(padded((4, 6)))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        wanted = float(model(**{name: value[:1] for name, value in (batch | {"labels": labels}).items()}).loss)
    assert Loss()(model, [batch | {"labels": labels}])[0] == pytest.approx(wanted, rel=1e-4)


def test_losses_and_error_norms_are_those_of_each_example_alone(model: nn.Module) -> None:
    batch = padded(LENGTHS)
    losses, errors = [], []
    for one in one_by_one(model, batch):
        with torch.no_grad():
            outputs = model(**one, labels=one["input_ids"])
        losses.append(float(outputs.loss))
        targets = one["input_ids"][0, 1:]
        difference = outputs.logits[0, :-1].softmax(1) - nn.functional.one_hot(targets, VOCABULARY)
        errors.append(float(difference.norm(dim=1).mean()))
    assert Loss()(model, [batch]) == pytest.approx(losses, rel=1e-4)
    assert Loss("low")(model, [batch]) == pytest.approx(-np.array(losses), rel=1e-4)
    assert ErrorNorm()(model, [batch]) == pytest.approx(errors, rel=1e-4)
    middle = Loss("middle")(model, [batch])
    assert middle.argmax() == np.abs(np.array(losses) - np.median(losses)).argmin()


def test_labels_that_a_model_does_not_shift_are_read_unshifted() -> None:
    torch.manual_seed(0)
    masked = bert().eval()
    batch = padded((6, 6))
    with torch.no_grad():
        wanted = [float(masked(**one, labels=one["input_ids"]).loss) for one in one_by_one(masked, batch)]
    assert Loss()(masked, [batch]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("build", [bart, t5])
def test_an_encoder_decoder_model_is_given_its_targets(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    translator, sources, targets = build().eval(), padded((9, 5, 7)), padded((6,) * 3, seed=1)["input_ids"]
    targets[1, 3:] = -100
    batch = sources | {"labels": targets}
    losses, errors = [], []
    for i in range(3):
        with torch.no_grad():
            outputs = translator(**{name: value[i : i + 1] for name, value in batch.items()})
        losses.append(float(outputs.loss))
        counted = targets[i] != -100
        difference = outputs.logits[0].softmax(1)[counted] - nn.functional.one_hot(targets[i][counted], VOCABULARY)
        errors.append(float(difference.norm(dim=1).mean()))
    assert Loss()(translator, [batch]) == pytest.approx(losses, rel=1e-4)
    assert ErrorNorm()(translator, [batch]) == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_predictor_of_an_encoder_decoder_model_reads_its_encoder(with_loss: bool) -> None:
    torch.manual_seed(0)
    translator = bart().eval()
    sample = [padded(LENGTHS, seed) | {"labels": padded((6,) * 6, 9 - seed)["input_ids"]} for seed in range(4)]
    predictor = fit_influence(translator, sample, with_loss=with_loss, depth=1)
    assert np.isfinite(predictor(translator, sample)).all()
    assert predictor.influences == pytest.approx(exact_influences(translator, sample, length_normalised=True))


@pytest.mark.parametrize("strategy", [Loss(), ErrorNorm(), GradientNorm()])
def test_a_silent_start_of_the_stream_does_not_change_how_labels_are_read(strategy: Strategy) -> None:
    torch.manual_seed(0)
    masked, batch = bert().eval(), padded((6,) * 4)
    labels = batch["input_ids"].clone()
    labels[0] = -100
    nothing = batch | {"labels": torch.full_like(labels, -100)}
    scores = strategy(masked, [nothing, batch | {"labels": labels}])
    assert np.flatnonzero(np.isnan(scores)).tolist() == [0, 1, 2, 3, 4]
    assert scores[5:] == pytest.approx(strategy(masked, [batch])[1:], rel=1e-4)


def bert_for(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.BertConfig(vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0, **sizes, **changes)
    model: nn.Module = getattr(hf, f"BertFor{kind}")(config)
    return model.eval()


def several_labels() -> tuple[nn.Module, Batch]:
    model = bert_for("SequenceClassification", num_labels=3, problem_type="multi_label_classification")
    return model, padded((6,) * 4) | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])}


def regression() -> tuple[nn.Module, Batch]:
    return bert_for("SequenceClassification", num_labels=1), padded((6,) * 4) | {"labels": torch.randn(4)}


def question_answering() -> tuple[nn.Module, Batch]:
    places = torch.tensor([1, 2, 3, 4])
    return bert_for("QuestionAnswering"), padded((6,) * 4) | {"start_positions": places, "end_positions": places}


@pytest.mark.parametrize("task", [several_labels, regression, question_answering])
def test_a_model_with_another_loss_is_refused_with_the_way_out(task: Callable[[], tuple[nn.Module, Batch]]) -> None:
    model, batch = task()
    for strategy in (Loss(), GradientNorm(), GradientSimilarity((batch,))):
        with pytest.raises(ConfigurationError, match="pass loss="):
            strategy(model, [batch])


def test_input_ids_are_not_taken_for_a_classifiers_labels() -> None:
    model, batch = bert_for("SequenceClassification", num_labels=3), padded((6,) * 4)
    labelled = batch | {"labels": torch.tensor([0, 1, 2, 1])}
    assert np.isfinite(GradientNorm()(model, [labelled])).all()
    for strategy in (Loss(), GradientNorm(), GradientSimilarity((batch,))):
        with pytest.raises(ConfigurationError, match="the batch has no labels"):
            strategy(model, [batch])
    for measure in (lambda: LocalStatistics.gather(model, [batch]), lambda: Budget.device(model, (4, 6), free=1e9)):
        with pytest.raises(ConfigurationError, match="one class for each example"):
            measure()
    with pytest.raises(ValueError, match="batch_size"):  # these are given, and the model says what is wrong with them
        Loss()(model, [batch | {"labels": torch.tensor([0, 1, 2])}])


def test_gradients_are_of_the_loss_that_is_given() -> None:
    def loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs.logits, batch["labels"], reduction="none").mean(1)

    model, batch = several_labels()
    wanted = []
    for i in range(4):
        model(**{name: value[i : i + 1] for name, value in batch.items()}).loss.backward()
        wanted.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))
        model.zero_grad()
    assert GradientNorm(loss=loss)(model, [batch]) == pytest.approx(wanted, rel=1e-4)
    second = {name: value[1:2] for name, value in batch.items()}
    assert GradientSimilarity((second,), loss=loss)(model, [batch]).argmax() == 1


@pytest.mark.parametrize("strategy", [Loss(), GradientNorm()])
def test_batches_of_lists_are_refused_with_the_way_out(model: nn.Module, strategy: Strategy) -> None:
    rows = Dataset.from_dict({"input_ids": padded((6,) * 4)["input_ids"].tolist()})
    with pytest.raises(ConfigurationError, match="with_format"):
        strategy(model, DataLoader(rows, batch_size=2))


def test_chance_asks_an_example_with_a_label_how_labels_are_read() -> None:
    labels = torch.full((3, 6), -100)
    labels[1, 0] = labels[2, 3] = 1
    batch = padded((6,) * 3) | {"labels": labels}
    assert np.isnan(Random()(llama().eval(), [batch])).tolist() == [True, True, False]
    assert np.isnan(Random()(bert().eval(), [batch])).tolist() == [True, False, False]


def test_the_gradient_norm_over_several_checkpoints_is_the_mean(model: nn.Module) -> None:
    torch.manual_seed(1)
    other, batch = llama().eval(), padded(LENGTHS)
    mean = (exact_influences(model, [batch]) + exact_influences(other, [batch])) / 2
    assert GradientNorm((other,))(model, iter([batch])) == pytest.approx(mean)


def test_several_checkpoints_score_a_stream_batch_by_batch(model: nn.Module) -> None:
    torch.manual_seed(1)
    other, events = llama().eval(), []
    other.register_forward_hook(lambda *call: events.append("scored"))

    def stream() -> Iterator[Batch]:
        for seed in range(3):
            events.append("read")
            yield padded((6,), seed)

    GradientNorm((other,))(model, stream())
    assert [event for event, _ in groupby(events)] == ["read", "scored"] * 3


def test_chance_is_the_same_for_the_same_seed_and_another_for_another(model: nn.Module) -> None:
    batches = [padded(LENGTHS), padded(LENGTHS, 1)]
    assert Random(1)(model, batches).tolist() == Random(1)(model, batches).tolist()
    assert Random(1)(model, batches).tolist() != Random(2)(model, batches).tolist()
    assert len(Random()(model, batches)) == 12


def test_chance_too_knows_that_a_causal_model_has_no_target_in_its_first_label() -> None:
    labels = torch.full((2, 6), -100)
    labels[0, 0] = labels[1, 3] = 1
    batch = padded((6, 6)) | {"labels": labels}
    assert np.isnan(Random()(llama().eval(), [batch])).tolist() == [True, False]
    assert np.isnan(Random()(bert().eval(), [batch])).tolist() == [False, False]


def test_a_predictor_is_fitted_to_an_iterator_as_to_a_list(model: nn.Module) -> None:
    sample = [padded(LENGTHS * 2, seed) for seed in range(2)]
    predictor = fit_influence(model, iter(sample), depth=1)
    assert predictor.influences.tolist() == fit_influence(model, sample, depth=1).influences.tolist()


def test_scoring_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = llama().train()
    model.get_submodule("model.norm").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strategy in (Loss(), ErrorNorm(), GradientNorm(), fit_influence(model, [padded(LENGTHS * 4)])):
        strategy(model, [padded(LENGTHS)])
    assert model.training
    assert not model.get_submodule("model.norm").training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# --- Algorithm 2


def pool(seed: int, count: int) -> list[Batch]:
    """Examples whose influence varies: few or many distinct tokens, short or long."""
    rng = np.random.default_rng(seed)
    batches = []
    for number in range(count):
        batch = padded(tuple(rng.integers(4, 24, 6).tolist()), seed=1_000 * seed + number)
        alike = torch.tensor(rng.random(6) < 0.5).unsqueeze(1)
        ids = torch.where(alike, batch["input_ids"] % 3 + 1, batch["input_ids"]) * batch["attention_mask"]
        batches.append(batch | {"input_ids": ids})
    return batches


@pytest.fixture(scope="module")
def sample() -> list[Batch]:
    return pool(0, 16)


def test_the_predictor_ranks_examples_that_it_has_not_seen(model: nn.Module, sample: list[Batch]) -> None:
    predictor = fit_influence(model, sample, length_normalised=False)
    unseen = pool(1, 16)
    truth = exact_influences(model, unseen)
    correlation = np.corrcoef(np.argsort(np.argsort(predictor(model, iter(unseen)))), np.argsort(np.argsort(truth)))
    assert correlation[0, 1] > 0.7
    predicted, by_length = predictor.calibration.predicted, predictor.calibration.by_length
    assert predicted.low < predicted.value < predicted.high
    assert predicted.low - 0.1 < correlation[0, 1] < predicted.high + 0.1
    assert by_length is not None
    assert by_length.low < by_length.value < by_length.high < predicted.low
    assert predictor.calibration.examples == 96
    assert f"{predicted} on 96 held-out examples; by loss alone" in str(predictor.calibration)
    assert str(predictor.calibration).endswith(f"by length alone {by_length}")


def test_without_the_loss_only_the_first_blocks_run(model: nn.Module, sample: list[Batch]) -> None:
    predictor = fit_influence(model, sample, with_loss=False, depth=1)
    assert predictor.calibration.by_loss is None
    runs: list[Tensor] = []
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda *call: runs.append(call[2]))
    unseen = pool(1, 8)
    predicted = predictor(model, unseen)
    handle.remove()
    assert len(runs) == 1  # the first example, from which it is read whether labels are shifted
    assert len(predicted) == 48
    assert np.isfinite(predicted).all()


def test_noise_is_predicted_by_nothing_and_intervals_say_so() -> None:
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x, noise = rng.standard_normal((24, 6)), rng.standard_normal(24)
        found.append(held_out_correlation(x, noise, np.ones(6), noise, seed))
    assert abs(np.mean([each.value for each in found])) < 0.06  # of pooled predictions -0.24
    assert sum(each.high < 0 for each in found) <= 5
    assert sum(each.low > 0 for each in found) <= 5


@pytest.mark.parametrize("strength", [0.6, 3.0])
def test_the_correlation_out_of_fold_is_that_with_fresh_examples(strength: float) -> None:
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((64, 34))
        y = strength * x[:, 0] + rng.standard_normal(64)
        importance = np.append(1, np.full(33, 33**-0.5))
        held_out = held_out_correlation(x, y, importance, y, seed)
        unseen = rng.standard_normal((2000, 34))
        truth = strength * unseen[:, 0] + rng.standard_normal(2000)
        expected = stats.spearmanr(Ridge.fit(x, y, importance).predict(unseen), truth).statistic
        found.append((held_out.value, expected, held_out.low <= expected <= held_out.high))
    correlation, expected, covered = np.mean(found, axis=0)
    assert correlation == pytest.approx(expected, abs=0.05)
    assert covered >= 0.9


def test_equal_features_have_equal_places() -> None:
    x, folds = np.repeat(np.arange(10.0), 4)[:, None], np.tile(np.arange(4), 10)
    places = places_out_of_fold(x, x[:, 0], np.ones(1), folds)
    assert places.tolist() == np.repeat(np.arange(2.5, 40, 4), 4).tolist()


def test_an_outlier_bends_neither_the_fit_nor_the_ranking(model: nn.Module, sample: list[Batch]) -> None:
    ridge = Ridge.fit(np.arange(100.0)[:, None], np.arange(100.0), np.ones(1))
    assert ridge.predict(np.array([[1e9]]))[0] < 200
    plain = fit_influence(model, sample)
    wild = fit_influence(model, sample, winsorise=0.0)
    assert plain.ridge.intercept != wild.ridge.intercept


def test_too_small_a_sample_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        fit_influence(model, [padded(LENGTHS)])


def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="blocks"):
        fit_influence(model, [padded(LENGTHS * 4)], depth=3)


def test_hidden_states_of_sound_are_read_behind_its_convolutions() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = hf.Wav2Vec2Config(
        **sizes, **convolutions, intermediate_size=24, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2
    )
    model = hf.Wav2Vec2ForSequenceClassification(config)
    sample = [
        {
            "input_values": torch.randn(4, 200 + 20 * i),
            "attention_mask": torch.ones(4, 200 + 20 * i, dtype=torch.long),
            "labels": torch.randint(0, 2, (4,)),
        }
        for i in range(6)
    ]
    predictor = fit_influence(model, sample)
    assert predictor.block == "wav2vec2.encoder.layers.1"
    assert np.isfinite(predictor(model, sample)).all()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    words = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = {**words, "vocab_size": 61, "intermediate_size": 24, "rope_parameters": rope}
    vision = {**sizes, "depth": 2, "embed_dim": 16, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2}
    tokens = dict(zip(("image", "video", "vision_start", "vision_end"), range(50, 54), strict=True))
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "temporal_patch_size": 1},
        **{f"{name}_token_id": token for name, token in tokens.items()},
    )
    model: nn.Module = hf.Qwen2VLForConditionalGeneration(config)
    return model.eval()


def of_images(examples: int, seed: int) -> Batch:
    """Each example with one image of 16 patches, which 4 tokens stand for."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 49, (examples, 9))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 52, 50, 53
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids >= 50, -100),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 50).long(),
        "pixel_values": torch.randn(16 * examples, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * examples),
    }


def test_images_are_measured_one_example_a_batch_and_not_guessed_apart() -> None:
    model = qwen2_vl()
    with pytest.raises(ConfigurationError, match=r"pixel_values has 32 rows for 2 examples.*batches of one example"):
        exact_influences(model, [of_images(2, 0)])
    sample = [of_images(1, seed) for seed in range(20)]
    predictor = fit_influence(model, sample)
    assert predictor.block == "model.language_model.layers.1"
    assert np.isfinite(predictor(model, sample)).all()


def test_a_model_whose_blocks_hand_on_images_is_refused() -> None:
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = hf.ResNetForImageClassification(config).eval()
    batches = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}] * 5
    with pytest.raises(ConfigurationError, match=r"at least 2 blocks .* rank by GradientNorm\(\)"):
        fit_influence(model, batches)


def test_ridge_takes_the_strength_with_the_least_error_left_one_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((25, 6))
    y = x[:, 0] + 0.8 * rng.standard_normal(25)
    importance = np.array([1.0, 1, 1, 0.5, 0.5, 0.5])
    found = Ridge.fit(x, y, importance)
    z = (x - x.mean(0)) / x.std(0) * importance
    errors = {}
    for strength in STRENGTHS * np.linalg.norm(z, 2) ** 2:
        residuals = []
        for left_out in range(25):
            inside = np.arange(25) != left_out
            centre, level = z[inside].mean(0), y[inside].mean()
            a = z[inside] - centre
            w = np.linalg.solve(a.T @ a + strength * np.eye(6), a.T @ (y[inside] - level))
            residuals.append(y[left_out] - level - (z[left_out] - centre) @ w)
        errors[float(strength)] = float(np.mean(np.square(residuals)))
    best = min(errors, key=lambda strength: errors[strength])
    assert found.strength == pytest.approx(best)
    assert found.left_out_error == pytest.approx(errors[best])
    w = np.linalg.solve(z.T @ z + best * np.eye(6), z.T @ (y - y.mean()))
    assert found.predict(x) == pytest.approx(y.mean() + z @ w)


def test_the_error_left_one_out_is_that_of_refitting_where_features_are_clipped() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(1.5 * rng.standard_normal((40, 5)))
    y = np.log(x[:, 0] + 3.5) + 0.3 * rng.standard_normal(40)
    found = Ridge.fit(x, y, np.ones(5))
    z = (x - x.mean(0)) / x.std(0)
    assert z.max() > 4.5
    z = z.clip(-4, 4)
    residuals = []
    for left_out in range(40):
        inside = np.arange(40) != left_out
        centre, level = z[inside].mean(0), y[inside].mean()
        a = z[inside] - centre
        w = np.linalg.solve(a.T @ a + found.strength * np.eye(5), a.T @ (y[inside] - level))
        residuals.append(y[left_out] - level - (z[left_out] - centre) @ w)
    assert found.left_out_error == pytest.approx(float(np.mean(np.square(residuals))))
    assert found.predict(x).mean() == pytest.approx(y.mean())


def test_ridge_ignores_a_feature_that_never_varied() -> None:
    x = np.stack([np.arange(30.0), np.full(30, 7.0)], 1)
    ridge = Ridge.fit(x, np.arange(30.0), np.ones(2))
    assert ridge.predict(np.array([[3.0, 7.0]])) == pytest.approx(ridge.predict(np.array([[3.0, 99.0]])))
