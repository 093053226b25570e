"""Which examples to train on: Algorithm 2 of the paper, and the rivals it has to beat.

A strategy scores every example of a stream of batches, higher first; `select_data` keeps the best share as an index:

>>> predictor = fit_influence(model, sample_batches)                     # doctest: +SKIP
>>> print(predictor.calibration)                                         # doctest: +SKIP
>>> index = select_data(model, DataLoader(dataset, 8), 0.3, predictor)   # doctest: +SKIP
>>> dataset.select(index)  # or torch.utils.data.Subset(dataset, index)  # doctest: +SKIP

Batches are dicts as the model takes them, in the order of the data set (`shuffle=False`). Only scores are kept of the
stream, 8 bytes an example. A large gradient may be noise: compare with `Random` before believing any of them
(docs/data-selection.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from gradient_blueprints.allocation import spearman
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.losses import (
    IGNORED,
    Batch,
    LossFunction,
    LossReader,
    evaluating,
    examples_in,
    on_device_of,
    slice_examples,
    target_tokens,
    token_losses,
)
from gradient_blueprints.training.ridge import Ridge, places_out_of_fold

Scores = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Preference = Literal["high", "low", "middle"]

_FOLDS = 5
_RESAMPLES = 1_000
_FEWEST = 20


class Strategy(Protocol):
    """Scores of examples, (examples,), in their order; NaN without a target. What is not finite is never kept."""

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores: ...


def select_data(
    model: nn.Module, batches: Iterable[Batch], fraction: float, strategy: Strategy, *, guard: float = 0.0
) -> Index:
    """Positions of the `fraction` of the examples that the strategy scores highest, ascending (Algorithm 2, step 4).

    `guard`: leave out this share with the very highest scores first. Broken text has large gradients.
    Raises ConfigurationError for a DataLoader whose batches are not the whole data set in its order.
    """
    if isinstance(batches, DataLoader):
        _check_order(batches)
    return keep_top(strategy(model, batches), fraction, guard=guard)


def keep_top(scores: npt.ArrayLike, fraction: float, *, guard: float = 0.0) -> Index:
    """The index for scores that are there already.

    >>> keep_top(np.array([0.1, 9.0, 0.3, np.nan, 0.2]), 0.4, guard=0.2)
    array([2, 4])

    Raises ConfigurationError when nothing would be kept, and for scores that are not one for each example.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1:
        raise ConfigurationError(f"scores have the shape {scores.shape}: give one for each example, (examples,)")
    if not 0 < fraction <= 1 or not 0 <= guard < 1:
        raise ConfigurationError(f"fraction = {fraction} is a share in (0, 1], guard = {guard} one in [0, 1)")
    known = np.flatnonzero(np.isfinite(scores))
    best = known[np.argsort(-scores[known], kind="stable")]
    start = int(guard * len(scores) + 1e-9)
    kept = best[start : start + int(fraction * len(scores) + 1e-9)]
    if not len(kept):
        raise ConfigurationError(
            f"fraction = {fraction} after guard = {guard} keeps none of {len(scores)} examples, "
            f"{len(known)} with a finite score: raise the fraction, lower the guard, or give more examples with targets"
        )
    return np.sort(kept)


def _check_order(loader: DataLoader[Any]) -> None:
    batches, stream = loader.batch_sampler, isinstance(loader.dataset, IterableDataset)
    drawn: Any = getattr(batches, "sampler", loader.sampler)
    if isinstance(drawn, DistributedSampler):
        raise ConfigurationError(
            "a DistributedSampler gives each process a part, whose positions are not the data set's: score the whole "
            "data set in one process, by a DataLoader without a sampler"
        )
    for each, plain in ((drawn, SequentialSampler), (batches, BatchSampler)):
        if each is not None and type(each) is not plain and not (stream and each is drawn):
            raise ConfigurationError(
                f"the index holds positions in the data set, and {type(each).__name__} may draw others: give a "
                "DataLoader with shuffle=False and without a sampler"
            )
    if stream and loader.num_workers > 1:
        raise ConfigurationError("several workers mix the order of a stream: num_workers of at most 1")
    if isinstance(batches, BatchSampler) and batches.drop_last:
        dropped = "ones of the stream" if stream else len(drawn) % batches.batch_size
        if dropped:
            raise ConfigurationError(f"the last {dropped} examples would not be scored: drop_last=False")


# --- exact influences


def exact_influences(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    length_normalised: bool = False,
    loss: LossFunction | None = None,
) -> Scores:
    """J(z) = ||∇L(z)|| over the whole model (eq. 27), L the mean loss of z's target tokens; (examples,).

    One forward and backward pass per batch. The gradient of a mean over t tokens whose gradients are mostly noise
    shrinks as 1/√t, so J favours short examples; `length_normalised` gives J·√t instead. NaN for an example without a
    target, and for one whose loss or gradient is not finite: its batch is then measured again, one by one.
    `loss(outputs, batch)`: per-example losses of a model whose loss is not a mean cross-entropy.
    """
    with _influences(model, length_normalised, loss) as measure:
        return _joined([measure(batch) for batch in batches])


@contextmanager
def _influences(
    model: nn.Module, length_normalised: bool, loss: LossFunction | None
) -> Iterator[Callable[[Batch], Scores]]:
    """What gives J of a batch's examples; nothing is kept of it."""
    with evaluating(model), GradientProfiler(model, groups="block", statistics="examples", loss=loss) as profiler:

        def measure(batch: Batch) -> Scores:
            examples = examples_in(batch)
            scores = np.full(examples, np.nan)
            profiler.step(batch, key=0)
            domain = profiler.domain()
            counted, silent = domain.counted(0), domain.silent.pop(0, None)
            record, skipped = domain.records.pop(0, None), domain.skipped.pop(0, None)
            if record is not None:
                weights = np.sqrt(record.tokens) if length_normalised else 1.0
                scores[counted] = np.sqrt(record.example_squares.sum(0)) * weights
            elif skipped and silent is None and examples > 1:  # not finite, which may be one example's fault
                return _joined([measure(slice_examples(batch, i, i + 1)) for i in range(examples)])
            return scores

        yield measure


# --- Algorithm 2


@dataclass(frozen=True)
class Correlation:
    """Spearman's, with a 95 % interval by bootstrap over examples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Calibration:
    """How far f_φ can be believed: rank correlations with the true J on examples that it was not fitted to."""

    examples: int
    predicted: Correlation
    """`held_out_correlation` of f_φ with true J; 0 on average where nothing can be predicted."""
    by_loss: Correlation | None
    """What the loss alone reaches on the same examples; None where it was not read, or is the same for all.

    No fold changes how a loss or a length ranks them, so these compare with `predicted`.
    """
    by_length: Correlation | None
    """What the number of target tokens alone reaches; None where all are as long."""

    def __str__(self) -> str:
        alone = ", ".join(
            f"by {name} alone {'–' if found is None else found}"
            for name, found in (("loss", self.by_loss), ("length", self.by_length))
        )
        return (
            f"rank correlation with the true influence {self.predicted} on {self.examples} held-out examples; {alone}"
        )


@dataclass(frozen=True)
class InfluencePredictor:
    """f_φ of Algorithm 2, a strategy: ridge regression of log J on features that need no backward pass."""

    ridge: Ridge
    block: str
    """Name of the module whose hidden states are read."""
    with_loss: bool
    calibration: Calibration
    influences: Scores
    """The true J of the sample, (examples,)."""

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        """Predicted J of every example, up to a monotone function of it."""
        features = _features(model, batches, self.block, with_loss=self.with_loss)
        return _joined([self.ridge.predict(part) for part in features])


def fit_influence(
    model: nn.Module,
    sample: Iterable[Batch],
    *,
    depth: int = 2,
    with_loss: bool = True,
    length_normalised: bool = True,
    winsorise: float = 0.02,
    seed: int = 0,
) -> InfluencePredictor:
    """Steps 1 to 3 of Algorithm 2: the exact J of a small sample, and f_φ fitted to it.

    Features: the mean over positions of the hidden state after the model's first `depth` blocks, the logarithm of the
    number of targets, and the loss. `with_loss=False` stops the model after those blocks: far cheaper, less exact.
    `winsorise`: log J is clipped to its quantiles at this share and its complement before fitting, features to four
    standard deviations, so that no outlier bends the fit or is carried to the top by it.
    The paper's own J is `length_normalised=False`.

    Raises ConfigurationError for fewer than 20 examples with a gradient, and for no batch at all.
    """
    sample = list(sample)  # it is run through twice, in the same order
    influences = exact_influences(model, sample, length_normalised=length_normalised)
    block = _block(model, sample[0], depth)
    features = np.concatenate(list(_features(model, sample, block, with_loss=with_loss)))  # (examples, features)
    known = np.flatnonzero((influences > 0) & np.isfinite(features).all(1))
    if len(known) < _FEWEST:
        raise ConfigurationError(
            f"{len(known)} examples with a gradient are too few to fit to: give at least {_FEWEST}"
        )
    x, targets = features[known], np.log(influences[known])
    scalars = 2 if with_loss else 1
    width = x.shape[1] - scalars
    importance = np.append(np.full(width, width**-0.5), np.ones(scalars))
    clipped = np.clip(targets, *np.quantile(targets, [winsorise, 1 - winsorise]))
    calibration = Calibration(
        examples=len(known),
        predicted=held_out_correlation(x, clipped, importance, targets, seed),
        by_loss=_correlation(x[:, -1], targets, np.random.default_rng(seed)) if with_loss else None,
        by_length=_correlation(x[:, -scalars], targets, np.random.default_rng(seed)),
    )
    return InfluencePredictor(Ridge.fit(x, clipped, importance), block, with_loss, calibration, influences)


def held_out_correlation(
    features: Scores, targets: Scores, importance: Scores, truth: Scores, seed: int = 0
) -> Correlation:
    """Of the truth with the places out of five folds; 0 for one constant side.

    Features (n, p), targets to fit to (n,), importance (p,), truth (n,). The interval takes the fits as they are, with
    n/2 draws: two examples of different folds judge the fits to each other by the same product, so without signal the
    estimate varies as that of half as many independent examples (of 64 without signal 0.16 as standard deviation; n
    draws leave 0 outside of 14 to 18 % of the intervals, n/2 of 3 to 5 %). It is wider than need be where the
    correlation is strong.
    """
    rng = np.random.default_rng(seed)
    folds = rng.permutation(np.arange(len(targets)) % _FOLDS)
    places = places_out_of_fold(features, targets, importance, folds)
    return _correlation(places, truth, rng, draws=len(truth) // 2) or Correlation(0.0, 0.0, 0.0)


def _correlation(
    scores: Scores, truth: Scores, rng: np.random.Generator, draws: int | None = None
) -> Correlation | None:
    """Of independent examples, (n,) each; `draws` of them a resample, n unless said. None for one constant side."""
    found = spearman(scores.tolist(), truth.tolist())
    if found is None:
        return None
    resampled = [
        correlation
        for draw in rng.integers(0, len(truth), (_RESAMPLES, draws or len(truth)))
        if (correlation := spearman(scores[draw].tolist(), truth[draw].tolist())) is not None
    ]
    low, high = np.percentile(resampled, [2.5, 97.5]) if resampled else (0.0, 0.0)
    return Correlation(found, float(low), float(high))


def _features(model: nn.Module, batches: Iterable[Batch], block: str, *, with_loss: bool) -> Iterator[Scores]:
    """(examples, width + 1 or + 2) per batch: pooled hidden state, log of targets, loss."""
    for run in _forwards(model, batches, model.get_submodule(block), stop=not with_loss):
        assert run.hidden is not None
        hidden = run.hidden.float()  # (n, t, width)
        given = run.batch.get("attention_mask")
        if not isinstance(given, Tensor) or given.shape != hidden.shape[:2]:  # of sound it is one of samples
            given = torch.ones(hidden.shape[:2])
        mask = given.to(hidden).unsqueeze(2)
        columns = [(hidden * mask).sum(1) / mask.sum(1).clamp_min(1), run.tokens.clamp_min(1).log().unsqueeze(1)]
        if with_loss:
            columns.append(_loss(run.logits, run.labels, run.shift).unsqueeze(1))
        found = torch.cat([column.to(hidden) for column in columns], 1)
        found[run.tokens.to(found.device) == 0] = torch.nan
        yield found.double().cpu().numpy()


def _block(model: nn.Module, batch: Batch, depth: int) -> str:
    """Name of the `depth`-th block of the first list of blocks that hand on (examples, positions, width).

    Positions are those of the input ids, where there are any, and the width is the configuration's, where a list has
    it: neither the vision tower of a model of text and images nor the convolutions of one of sound.
    """
    blocks = {
        f"{name}.{depth - 1}": module[depth - 1]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and 1 <= depth <= len(module)
    }
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        shapes[module] = hidden.shape if isinstance(hidden, Tensor) else torch.Size()

    with ExitStack() as hooks:
        for block in blocks.values():
            hooks.callback(block.register_forward_hook(note).remove)
        next(_forwards(model, [batch]))
    ids = batch.get("input_ids")
    positions = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
    config: Any = getattr(model, "config", None)
    width = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)
    fitting = {
        name: shapes[block][2]
        for name, block in blocks.items()
        if len(shapes.get(block, ())) == 3 and shapes[block][0] == examples_in(batch)
        if positions in (None, shapes[block][1])
    }
    if not fitting:
        raise ConfigurationError(
            f"The model has no list of at least {depth} blocks whose hidden states are (examples, positions, width), "
            "so there is nothing to predict influence from: rank by GradientNorm(), which measures it, or by Loss()."
        )
    return next((name for name, found in fitting.items() if found == width), next(iter(fitting)))


# --- rivals


@dataclass(frozen=True)
class Random:
    """Chance: the rival that everything has to beat."""

    seed: int = 0

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        reader = LossReader(model)
        silent = _joined([_without_targets(reader, reader.with_labels(batch, run=False)) for batch in batches])
        scores = np.random.default_rng(self.seed).random(len(silent))
        scores[silent > 0] = np.nan
        return scores


def _without_targets(reader: LossReader, batch: Batch) -> Scores:
    """1 for an example without a target, else 0, (examples,); the model runs only where its shift decides."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return np.zeros(examples_in(batch))
    shifted, unshifted = (target_tokens(labels, shift=shift) == 0 for shift in (True, False))
    silent = shifted if not torch.equal(shifted, unshifted) and reader.shifts(batch) else unshifted
    return silent.double().cpu().numpy()


@dataclass(frozen=True)
class Loss:
    """Mean loss per target token, one forward pass; `prefer` what is hard, easy, or nearest to the median."""

    prefer: Preference = "high"

    def __post_init__(self) -> None:
        if self.prefer not in get_args(Preference):
            raise ConfigurationError(f"prefer is one of {', '.join(get_args(Preference))}, not {self.prefer!r}")

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        losses = _per_example(model, batches, _loss)
        if self.prefer == "middle":
            return -np.abs(losses - np.nanmedian(losses))
        return losses if self.prefer == "high" else -losses


@dataclass(frozen=True)
class ErrorNorm:
    """EL2N (Paul et al. 2021): the mean over target tokens of ||softmax(logits) - onehot||, one forward pass."""

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        return _per_example(model, batches, _error_norm)


@dataclass(frozen=True)
class GradientNorm:
    """GraNd (Paul et al. 2021) at the model as it is: the exact J of every example, not a prediction of it.

    GraNd proper averages J over several networks early in training; `others` are such further checkpoints.
    `loss(outputs, batch)`: per-example losses of a model whose loss is not a mean cross-entropy.
    """

    others: tuple[nn.Module, ...] = ()
    length_normalised: bool = False
    loss: LossFunction | None = None

    def __call__(self, model: nn.Module, batches: Iterable[Batch]) -> Scores:
        with ExitStack() as stack:
            measures = [
                stack.enter_context(_influences(one, self.length_normalised, self.loss))
                for one in (model, *self.others)
            ]
            return _joined([np.mean([measure(batch) for measure in measures], axis=0) for batch in batches])


def _loss(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    return token_losses(logits, labels, shift=shift).values


def _error_norm(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """||p - y||² = Σp² - 2 p_y + 1 at every target, logits (n, t, vocabulary) or (n, classes)."""
    if labels.dim() == 1:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    elif shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = []
    for example, targets in zip(logits, labels, strict=True):  # one at a time: positions × vocabulary floats
        counted = targets != IGNORED
        shares = example[counted].float().softmax(1)
        of_target = shares.gather(1, targets[counted].unsqueeze(1)).squeeze(1)
        found.append((shares.square().sum(1) - 2 * of_target + 1).clamp_min(0).sqrt().mean())
    return torch.stack(found)


def _per_example(model: nn.Module, batches: Iterable[Batch], score: Callable[[Tensor, Tensor, bool], Tensor]) -> Scores:
    found = []
    for run in _forwards(model, batches):
        values = score(run.logits, run.labels, run.shift).double().cpu().numpy()
        values[(run.tokens == 0).cpu().numpy()] = np.nan
        found.append(values)
    return _joined(found)


# --- running the model


class _Enough(Exception):
    """The blocks that were wanted have run; the rest of the forward pass is not needed."""


@dataclass
class _Forward:
    """One batch through the model, without gradients."""

    batch: Batch
    shift: bool
    outputs: Any = None
    hidden: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        labels: Tensor = self.batch["labels"]
        return labels

    @property
    def logits(self) -> Tensor:
        logits: Tensor = self.outputs if isinstance(self.outputs, Tensor) else self.outputs.logits
        return logits

    @property
    def tokens(self) -> Tensor:
        """Targets of every example, (n,)."""
        return target_tokens(self.labels, shift=self.shift)


def _forwards(
    model: nn.Module, batches: Iterable[Batch], block: nn.Module | None = None, *, stop: bool = False
) -> Iterator[_Forward]:
    """Run every batch; `block`: note its hidden states, and go no further if `stop`."""
    reader = LossReader(model)
    for given in batches:
        batch = on_device_of(model, reader.with_labels(given))
        with evaluating(model), torch.no_grad():
            run = _Forward(batch, reader.shifts(batch))

            def note(module: nn.Module, inputs: Any, output: Any, run: _Forward = run) -> None:
                run.hidden = output if isinstance(output, Tensor) else output[0]
                if stop:
                    raise _Enough

            hook = None if block is None else block.register_forward_hook(note)
            try:
                run.outputs = model(**{k: value for k, value in batch.items() if k != "labels" or reader.seq2seq})
            except _Enough:
                pass
            finally:
                if hook is not None:
                    hook.remove()
        yield run


def _joined(parts: Sequence[Scores]) -> Scores:
    if not parts:
        raise ConfigurationError("there is no batch to score: was the iterator used up before?")
    return np.concatenate(parts)
