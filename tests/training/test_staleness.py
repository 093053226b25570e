"""Agreement of a published blueprint with local data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.staleness import compare_with_local, spearman


def make_blueprint(norms: list[float], **fields: list[float]) -> Blueprint:
    layers = [
        {"id": f"layer.{index}", "gradient_norm": norm} | {name: values[index] for name, values in fields.items()}
        for index, norm in enumerate(norms)
    ]
    return Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=3, max_size=30))
def test_rank_correlation_is_that_of_scipy_with_ties(pairs: list[tuple[int, float]]) -> None:
    left, right = [float(a) for a, _ in pairs], [b for _, b in pairs]
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert spearman(left, right) is None
    else:
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_a_blueprint_holds_where_local_ranks_are_its_own() -> None:
    norms = [1.0, 4.0, 2.0, 8.0]
    published, local = make_blueprint(norms), make_blueprint([10 * norm for norm in norms])
    agreement = compare_with_local(published, local, (local, local))
    assert [agreement.correlation, agreement.ceiling] == pytest.approx([1, 1])
    assert not agreement.stale


def test_a_blueprint_is_stale_where_local_ranks_are_others_but_agree_among_themselves() -> None:
    published, local = make_blueprint([1.0, 2.0, 3.0, 4.0]), make_blueprint([4.0, 3.0, 2.0, 1.0])
    assert compare_with_local(published, local, (local, local)).stale


def test_a_local_sample_that_does_not_agree_with_itself_calls_nothing_stale() -> None:
    published = make_blueprint([1.0, 2.0, 3.0, 4.0])
    halves = make_blueprint([1.0, 4.0, 2.0, 3.0]), make_blueprint([3.0, 1.0, 4.0, 2.0])
    agreement = compare_with_local(published, make_blueprint([1.0, 3.0, 2.0, 4.0]), halves)
    assert agreement.ceiling == 0
    assert not agreement.stale


def test_ranks_are_those_of_the_signal_where_all_have_it() -> None:
    published = make_blueprint([1.0, 2.0, 3.0], signal=[3.0, 2.0, 1.0])
    local = make_blueprint([1.0, 2.0, 3.0], signal=[1.0, 2.0, 3.0])
    assert compare_with_local(published, local, (local, local)).correlation == pytest.approx(-1)
    bare = make_blueprint([1.0, 2.0, 3.0])
    assert compare_with_local(published, local, (local, bare)).correlation == pytest.approx(1)


def test_models_without_common_layers_cannot_be_compared() -> None:
    other = Blueprint.from_dict(
        {"model_id": "m", "training_checkpoint": 1.0, "layers": [{"id": "elsewhere", "gradient_norm": 1.0}]}
    )
    published = make_blueprint(list(np.arange(5.0)))
    with pytest.raises(ValueError, match="0 common layers"):
        compare_with_local(published, other, (other, other))
