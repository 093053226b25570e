"""Random projections of per-example gradients, and the ranking by likeness to a target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.data_selection import select_data
from gradient_blueprints.training.gradient_similarity import GradientSimilarity, projected_gradients
from tests.training.profiling.small_models import VOCABULARY, Batch, bert, llama


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def tokens_from(low: int, high: int, examples: int, seed: int) -> Batch:
    return {"input_ids": torch.randint(low, high, (examples, 10), generator=torch.Generator().manual_seed(seed))}


def whole_gradients(model: nn.Module, batch: Batch) -> Tensor:
    rows = []
    for i in range(len(batch["input_ids"])):
        one = batch["input_ids"][i : i + 1]
        model.zero_grad()
        model(input_ids=one, labels=one).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return torch.stack(rows)


def test_inner_products_are_kept_within_what_johnson_and_lindenstrauss_allow(model: nn.Module) -> None:
    batch = tokens_from(1, VOCABULARY, 6, seed=0)
    truth = whole_gradients(model, batch)
    exact, squares = truth @ truth.T, truth.square().sum(1)
    bound = squares.unsqueeze(1) * squares + exact.square()  # variance times dimension
    for dimension in (256, 4096):
        found = projected_gradients(model, [batch], dimension)
        assert found.shape == (6, dimension)
        error = found @ found.T - exact
        assert bool((error.abs() <= 4 * (bound / dimension).sqrt()).all())


def test_inner_products_are_right_on_average_over_projections(model: nn.Module) -> None:
    batch = tokens_from(1, VOCABULARY, 2, seed=1)
    truth = whole_gradients(model, batch)
    exact = float(truth[0] @ truth[1])
    found = []
    for seed in range(40):
        one, two = projected_gradients(model, [batch], 64, seed)
        found.append(float(one @ two))
    assert np.mean(found) == pytest.approx(exact, abs=4 * float(np.std(found)) / 40**0.5)
    assert np.std(found) > 0


def test_a_projection_does_not_depend_on_the_batch_and_repeats(model: nn.Module) -> None:
    batch = tokens_from(1, VOCABULARY, 4, seed=2)
    whole = projected_gradients(model, [batch], 128)
    parts = projected_gradients(model, [{"input_ids": row.unsqueeze(0)} for row in batch["input_ids"]], 128)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, projected_gradients(model, [batch], 128, seed=1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_examples_like_the_target_are_chosen(model: nn.Module) -> None:
    like, unlike = tokens_from(1, 5, 8, seed=3)["input_ids"], tokens_from(40, 44, 8, seed=4)["input_ids"]
    mixed = [{"input_ids": torch.stack([like[i], unlike[i]])} for i in range(8)]
    strategy = GradientSimilarity((tokens_from(1, 5, 16, seed=5),))
    assert select_data(model, mixed, 0.5, strategy).tolist() == list(range(0, 16, 2))


def test_an_example_without_targets_has_no_similarity(model: nn.Module) -> None:
    batch = tokens_from(1, 20, 3, seed=3)
    labels = batch["input_ids"].clone()
    labels[1] = -100
    scores = GradientSimilarity((batch,), dimension=64)(model, [batch | {"labels": labels}])
    assert np.isnan(scores).tolist() == [False, True, False]


def test_a_first_example_without_targets_does_not_change_how_labels_are_read() -> None:
    torch.manual_seed(0)
    masked, batch = bert().eval(), tokens_from(1, 20, 3, seed=3)
    labels = batch["input_ids"].clone()
    labels[0] = -100
    found = projected_gradients(masked, [batch | {"labels": labels}], 64)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], projected_gradients(masked, [batch], 64)[1:])


def test_gradients_in_the_making_are_not_swept_away(model: nn.Module) -> None:
    batch = tokens_from(1, 20, 2, seed=3)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with pytest.raises(ConfigurationError, match="zero_grad"):
        projected_gradients(model, [batch])
    model.zero_grad()
