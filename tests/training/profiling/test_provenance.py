"""What was run on what, and that a repetition says the same bytes."""

import copy
import hashlib

import torch
from torch import nn

from gradient_blueprints.models import Provenance
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.digests import batch_digest, weights_digest
from tests.training.profiling.small_models import Batch, batch, build


def profile(model: nn.Module, batches: list[Batch]) -> GradientProfiler:
    with GradientProfiler(model) as profiler:
        for index, values in enumerate(batches):
            profiler.step(values, key=index)
    return profiler


def test_a_repetition_gives_the_same_bytes_and_resources_make_it_differ() -> None:
    batches = [batch(seed=1), batch(seed=2)]
    first, second = (profile(build("llama"), batches) for _ in range(2))
    assert first.blueprint("m", 1.0).digest == second.blueprint("m", 1.0).digest
    provenance = first.blueprint("m", 1.0, resources=True).provenance
    assert provenance is not None
    assert isinstance(provenance.resources, dict)
    assert set(provenance.resources) >= {"seconds", "peak_memory_bytes"}
    assert first.blueprint("m", 1.0).provenance.resources is None  # type: ignore[union-attr]


def test_the_digest_of_the_data_does_not_depend_on_order_or_shards() -> None:
    model, batches = build("llama"), [batch(seed=seed) for seed in range(3)]
    whole = profile(model, batches).blueprint("m", 1.0).provenance
    shards = []
    for mine in ((2,), (0, 1)):
        with GradientProfiler(copy.deepcopy(model)) as profiler:
            for index in mine:
                profiler.step(batches[index], key=index)
        shards.append(profiler.state())
    gathered = GradientProfiler(model)
    gathered.absorb(*shards)
    assert gathered.blueprint("m", 1.0).provenance == whole
    other = profile(model, [*batches[:2], batch(seed=9)]).blueprint("m", 1.0).provenance
    assert whole is not None
    assert other is not None
    assert isinstance(whole.data, dict)
    assert isinstance(other.data, dict)
    assert whole.data["general"] != other.data["general"]
    assert whole.weights_digest == other.weights_digest is not None


def test_labels_that_are_spelled_out_and_those_that_follow_are_the_same_data() -> None:
    implied = {name: value for name, value in batch(padded=False).items() if name != "labels"}
    model = build("llama")
    found = [profile(model, [values]).domain().records[0].digest for values in (implied, batch(padded=False))]
    assert found[0] == found[1]


def test_a_loss_of_the_caller_is_recorded_like_a_step() -> None:
    model = build("llama")
    with GradientProfiler(model) as profiler:
        profiler.backward(model(**batch()).loss)
    record = profiler.domain().records[0]
    assert (record.digest, record.length) == (batch_digest(batch()), 9)


def test_the_digest_of_weights_tells_one_changed_number() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    expected = hashlib.sha256(b"weight\0torch.float32\0(1, 2)\0" + b"\x00\x00\x80?\x00\x00\x00@").hexdigest()
    assert weights_digest(layer) == f"sha256:{expected}"
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert weights_digest(layer) != f"sha256:{expected}"


def test_tied_half_precision_and_buffered_weights_have_a_digest_and_offloaded_ones_have_none() -> None:
    model = build("llama").to(torch.bfloat16)
    assert weights_digest(model) == weights_digest(copy.deepcopy(model))
    assert weights_digest(nn.BatchNorm1d(3)) is not None  # a scalar buffer among them
    assert weights_digest(model.to("meta")) is None


def test_what_the_caller_says_of_the_weights_counts() -> None:
    said = Provenance(weights_digest="sha256:" + "a" * 64)
    provenance = profile(build("llama"), [batch()]).blueprint("m", 1.0, said).provenance
    assert provenance is not None
    assert provenance.weights_digest == said.weights_digest


def test_digests_can_be_left_out() -> None:
    with GradientProfiler(build("llama"), digests=False) as profiler:
        profiler.step(batch())
    provenance = profiler.blueprint("m", 1.0).provenance
    assert provenance is not None
    assert provenance.weights_digest is None
    assert provenance.data == {
        "general": {"batches": 1, "examples": 4, "tokens": int(batch()["labels"][:, 1:].ne(-100).sum())}
    }
