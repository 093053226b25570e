"""One batch through the model: the gradient norms of every (parameter, example) pair and the batch gradient."""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradient_blueprints.errors import BlueprintsError, ConfigurationError
from gradient_blueprints.training.gradient_hooks import unread
from gradient_blueprints.training.profiling.capture import Capture, ExamplesMixed, UncoveredParameter
from gradient_blueprints.training.profiling.contributions import Contribution, square, squares_of_sum
from gradient_blueprints.training.profiling.distributed import Ranks
from gradient_blueprints.training.profiling.layers import parameter_names
from gradient_blueprints.training.profiling.losses import (
    Batch,
    LossFunction,
    LossReader,
    examples_in,
    first_labelled,
    is_mean,
    slice_examples,
    target_tokens,
    token_losses,
)
from gradient_blueprints.training.profiling.offload import OffloadedWeights
from gradient_blueprints.training.profiling.random_state import RandomState
from gradient_blueprints.training.profiling.totals import BatchTotals, placed
from gradient_blueprints.training.profiling.train_mode import buffers_kept, refuse_batch_statistics

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(slots=True)
class Measurement:
    """What a pass found."""

    losses: Tensor  # (n,)
    tokens: Tensor  # (n,)
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Per parameter the squared norms of the examples' gradients, (n,)."""
    weighted_squares: dict[str, Tensor] = field(default_factory=dict)
    """|| sum_i w_i g_i ||^2, the squared norm of the gradient of the batch's token mean."""


class OutOfMemory(BlueprintsError, MemoryError):
    """The device's memory does not hold a forward and backward pass of one example."""


@dataclass(slots=True)
class _Batch:
    """A batch on its way through the model, whole or in micro-batches."""

    examples: int
    weights: Tensor | None = None
    """w_i of every example in the batch's token mean; None when equal."""
    norms: bool = False
    totals: BatchTotals | None = None
    whole: bool = True
    weighted_squares: dict[str, Tensor] = field(default_factory=dict)
    held: dict[tuple[str, bool], Tensor] = field(default_factory=dict)
    """With micro-batches: the sums so far."""

    def add(self, name: str, gradient: Tensor, *, weighted: bool) -> None:
        """The sum of the examples' gradients of a parameter, plain or by w_i, of the batch or a micro-batch."""
        if self.whole:
            self._take(name, gradient, weighted)
        elif (name, weighted) in self.held:
            held = self.held[name, weighted]
            held += gradient.to(held.device)
        else:
            self.held[name, weighted] = placed(gradient, "host" if self.totals is None else self.totals.place)

    def finish(self) -> None:
        """After the last micro-batch."""
        for name, weighted in sorted(self.held, key=lambda key: not key[1]):
            self._take(name, self.held.pop((name, weighted)), weighted)

    def _take(self, name: str, gradient: Tensor, weighted: bool) -> None:
        if weighted:
            self.weighted_squares[name] = square(gradient)
            return
        if self.weights is None:  # equal tokens: the mean of the examples
            self.weighted_squares[name] = square(gradient) / self.examples**2
        if self.totals is not None and bool(torch.isfinite(self.weighted_squares[name])):
            counted = self.examples if self.weights is None else int((self.weights > 0).sum())
            self.totals.take(name, gradient, counted)


class GradientPass:
    """Hooks on a model, and the passes through it. Parameters require no gradients while it lives."""

    def __init__(self, model: nn.Module, *, loss: LossFunction | None, verify: bool, micro_batch: int | None) -> None:
        self.model = model
        self._names = parameter_names(model)
        self._required = {path: model.get_parameter(path).requires_grad for path in self._names}
        self.reader = LossReader(model, loss)
        self._verify = verify
        self.micro_batch = micro_batch
        self.one_by_one: str | None = None
        """Why examples run one at a time; None when batches do."""
        self._probed = False
        self._several_probed = False
        self._kinds: set[frozenset[str]] = set()  # of batches that were probed, by their keys
        self._reference: dict[str, Tensor] = {}
        self._reference_at: int | None = None
        """The position of the example that the reference is of; None where it is of an earlier batch."""
        self._batch_checked = False
        self._by_autograd: set[str] = set()
        self._unused: set[str] = set()
        """Parameters that no example alone has used so far: autograd watches whether a batch does, which costs nothing
        until one does."""
        self._pending: dict[str, list[Contribution]] = {}
        self._found: Measurement | None = None
        self._batch: _Batch | None = None
        self._weights: Tensor | None = None
        self._inside = False
        self._external: tuple[Batch, Any] | None = None
        self._root_hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        self._ranks = Ranks(model)
        self._unread = ExitStack()
        self._watch = ExitStack()
        self._require(dict.fromkeys(self._names, False))
        if verify and not self._ranks.together:  # FSDP's ranks would wait for the gradient that one of them has
            self._unused.update(self._names.values())
        self._offloaded = OffloadedWeights(model, self._names)
        try:
            self._unread.enter_context(unread(self._parameters().values()))
            self._capture = Capture(model, self._names, self._arrive)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the hooks away and restore the requires_grad flags."""
        self._unread.close()
        self._watch.close()
        for hook in self._root_hooks:
            hook.remove()
        if hasattr(self, "_capture"):
            self._capture.close()
        self._offloaded.close()
        self._require(self._required)

    def _require(self, flags: Mapping[str, bool]) -> None:
        """Set requires_grad by path; looked up anew, since accelerate puts other objects in the parameters' places."""
        self._ranks.reshard()
        for path, flag in flags.items():
            self.model.get_parameter(path).requires_grad_(flag)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.model.get_parameter(name) for name in dict.fromkeys(self._names.values())}

    def _gradients(self) -> dict[str, Tensor]:
        """What plain autograd left, on parameters or on the loans of offloaded ones, in float32 or wider."""
        found = {name: p.grad for name, p in self._parameters().items() if p.grad is not None}
        found |= self._offloaded.gradients()
        return {name: g.detach() if g.dtype == torch.float64 else g.detach().float() for name, g in found.items()}

    def _reference_squares(self) -> dict[str, Tensor]:
        """Squared norms of what plain autograd left."""
        found = {}
        for name, gradient in self._gradients().items():
            full: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name] = full.double().square().sum()
        return found

    def with_labels(self, batch: Batch, pad_token_id: int | None) -> Batch:
        """The batch with labels, the input ids unless it has its own; ranks in step are not kept waiting for a run."""
        return self.reader.with_labels(batch, pad_token_id, run=not self._ranks.together)

    def measure(self, batch: Batch, *, norms: bool, totals: BatchTotals | None = None) -> Measurement:
        """Forward and backward of a batch that has labels.

        `norms`: also of the batch's gradient; `totals` takes in that gradient. A non-finite loss ends it early.
        ConfigurationError for batch norm in train mode.
        """
        refuse_batch_statistics(self.model)
        with buffers_kept(self.model):
            return self._measure_in_steps(batch, norms, totals)

    def _measure_in_steps(self, batch: Batch, norms: bool, totals: BatchTotals | None) -> Measurement:
        """As many examples at once as the model and the memory allow."""
        examples = examples_in(batch)
        failure = ""
        random = RandomState()
        try:
            self._learn(batch)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(_TOO_LARGE) from error
            raise
        while True:
            step = 1 if self.one_by_one else min(self.micro_batch or examples, examples)
            self._ranks.agree("their batches take as many passes as", math.ceil(examples / step))
            try:
                strayed = self._strayed_in_training(batch, step)
                if not strayed:
                    random.restore()
                    weights = self._token_weights(batch, examples)
                    measured = self._measure(batch, _Batch(examples, weights, norms, totals, step == examples), step)
                    strayed = self._strayed(measured) if self._ranks.any(step > 1) else []
            except ExamplesMixed as mixed:
                self._run_one_by_one(mixed.what)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    if self.one_by_one == failure:
                        self.one_by_one = None  # one of its examples fails alone too: the batch is at fault
                    if step == 1 or not self._probed or self._ranks.together:
                        raise
                    line, _, _ = str(error).partition("\n")
                    failure = f"Several examples at once fail where one did not: {line}"
                    self._run_one_by_one(failure)
                    continue
                if step == 1:
                    raise OutOfMemory(_TOO_LARGE) from error
                if self._ranks.together:
                    raise OutOfMemory(
                        "Out of memory on one of several ranks: set micro_batch on all of them."
                    ) from error
                self.micro_batch = (step + 1) // 2
            else:
                if not strayed:
                    return measured
                self._run_one_by_one(_STRAYED.format(_list(strayed)))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure(self, batch: Batch, whole: _Batch, step: int) -> Measurement:
        if whole.totals is not None:
            whole.totals.clear()
        parts = []
        for start in range(0, whole.examples, step):
            parts.append(self._run(slice_examples(batch, start, start + step), whole, start))
            if not (self._ranks.together or bool(torch.isfinite(parts[-1].losses).all())):
                break
        else:
            whole.finish()
        joined = _joined(parts)
        joined.weighted_squares = whole.weighted_squares
        return joined

    def _strayed(self, measured: Measurement) -> list[str]:
        """In eval mode, once: the parameters whose norms of the first example with a target differ from those it had
        alone."""
        if not self._verify or not self._probed or self._batch_checked or self._training:
            return []
        finite = self._ranks.of_first(bool(torch.isfinite(measured.losses).all()))
        if self._reference_at is None or not finite:
            self._several_probed = False  # the next batch brings a reference of its own
            return []
        self._batch_checked = True
        mine = {name: squares[self._reference_at] for name, squares in measured.squares.items()}
        found: list[str] = self._ranks.of_first(_differing(self._reference, mine, self._tolerance()))
        return found

    def _strayed_in_training(self, batch: Batch, step: int) -> list[str]:
        """In train mode, once: the parameters whose norms of one example inside its batch autograd does not confirm.

        Under dropout an example is another one alone. So its loss alone is differentiated inside the batch, by the
        rules and by autograd in the same backward pass. Not under FSDP, which averages what autograd gives.
        """
        unneeded = not self._verify or not self._probed or self._batch_checked or self._ranks.together
        if unneeded or step == 1 or not self._training:
            return []
        first = first_labelled(batch)
        start = min(first, examples_in(batch) - step)
        self._found = found = Measurement(torch.empty(0), torch.empty(0))
        with self._reached(self._parameters()), self._listening(step, _Batch(step)):
            losses = self.reader.run(slice_examples(batch, start, start + step))
            self._capture.forward_phase = False
            value, tokens = losses.values[first - start], losses.tokens[first - start]
            if not (bool(torch.isfinite(value)) and bool(tokens > 0)):
                return []  # the next batch is held against autograd
            value.backward()  # type: ignore[no-untyped-call]
            self._finish()
            reference = self._reference_squares()
        self._batch_checked = True
        mine = {name: squares[first - start] for name, squares in found.squares.items()}
        return _differing(reference, mine, self._tolerance())

    @property
    def _training(self) -> bool:
        """Whether some of the model is in train mode, where an example need not be the same twice."""
        return any(module.training for module in self.model.modules())

    def measure_backward(self, loss: Tensor, *, norms: bool, totals: BatchTotals | None = None) -> Measurement:
        """Backward of a loss that the caller computed by one call of the model, the token mean of its batch."""
        if self._external is None:
            raise ConfigurationError("Call the model on one batch with labels inside the context, then backward(loss).")
        (batch, outputs), self._external = self._external, None
        labels = batch["labels"]
        with torch.no_grad():
            losses = token_losses(outputs.logits.detach(), labels, shift=self.reader.shift_of(labels))
        tokens = losses.tokens.sum().clamp_min(1)
        mean, given = float((losses.values * losses.tokens).sum() / tokens), float(loss.detach())
        if not is_mean(mean, loss, outputs.logits):
            raise ConfigurationError(
                f"The loss {given:.6g} is not the token mean {mean:.6g} of the last batch; "
                "give model(**batch).loss as it is."
            )
        self._found = found = Measurement(losses.values, losses.tokens)
        examples = examples_in(batch)
        self._batch = _Batch(examples, self._token_weights(batch, examples), norms, totals)
        self._weights = self._batch.weights
        found.weighted_squares = self._batch.weighted_squares
        if not bool(torch.isfinite(losses.values).all()):
            return found
        try:
            self._capture.forward_phase = False
            with buffers_kept(self.model):  # rules call modules again
                loss.backward()  # type: ignore[no-untyped-call]
            self._notice_late(examples)
            self._finish()
        except ExamplesMixed as mixed:
            raise self._run_one_by_one(mixed.what) from None
        finally:
            self._capture.end()
            self._pending.clear()
            self._watch.close()
        strayed = self._strayed(found) if self._ranks.any(examples > 1) else []
        if strayed:
            raise self._run_one_by_one(_STRAYED.format(_list(strayed)))
        return found

    @property
    def awaited(self) -> Batch:
        """The batch whose loss `measure_backward` is waiting for; empty when the model was not called."""
        return {} if self._external is None else self._external[0]

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside or not torch.is_grad_enabled():
            return
        if args or not isinstance(kwargs.get("labels"), Tensor):
            raise ConfigurationError("Inside the profiler call the model by keywords with labels, or use step(batch).")
        refuse_batch_statistics(self.model)
        with torch.random.fork_rng(), buffers_kept(self.model):
            self._learn(kwargs)
            strayed = [] if self.one_by_one else self._strayed_in_training(kwargs, examples_in(kwargs))
        if strayed:
            self._run_one_by_one(_STRAYED.format(_list(strayed)))
        if self.one_by_one:
            raise UncoveredParameter(self.one_by_one)
        tokens = target_tokens(kwargs["labels"], shift=self.reader.shift_of(kwargs["labels"]))
        # the loss is the mean over all tokens; each example's own mean is what the norms are of
        scale = tokens.sum() / tokens.clamp_min(1)
        self._pending.clear()
        self._watch.close()
        if self._unused:
            self._watch.enter_context(self._reached(self._unused))
        self._capture.begin(examples_in(kwargs), scale=scale)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if not self._inside and torch.is_grad_enabled():
            self._external = (kwargs, outputs)

    def _run_one_by_one(self, reason: str) -> UncoveredParameter:
        """From now on; the error is for those who cannot."""
        self.one_by_one = reason
        return UncoveredParameter(reason)

    def _tolerance(self) -> float:
        return max(_TOLERANCE.get(parameter.dtype, 0.1) for parameter in self._parameters().values())

    def _token_weights(self, batch: Batch, examples: int) -> Tensor | None:
        """w_i = tokens_i / tokens, by which the batch gradient of a token mean weighs examples; None when equal."""
        tokens = self.reader.tokens_of(batch)
        if tokens is None or examples == 1 or bool((tokens == tokens[0]).all()):
            return None
        return tokens / tokens.sum()

    # --- one run

    def _run(self, batch: Batch, whole: _Batch, start: int) -> Measurement:
        examples = examples_in(batch)
        mine = None if whole.weights is None else whole.weights[start : start + examples]
        with self._listening(examples, whole, mine):
            losses = self.reader.run(batch)
            self._capture.forward_phase = False
            self._found = found = Measurement(losses.values.detach(), losses.tokens)
            if self._ranks.together or bool(torch.isfinite(found.losses).all()):
                losses.values.sum().backward()  # type: ignore[no-untyped-call]
                self._notice_late(examples)
                self._finish()
        return found

    @contextmanager
    def _listening(
        self, examples: int, whole: _Batch, weights: Tensor | None = None, *, recording: bool = False
    ) -> Iterator[None]:
        self._batch, self._weights = whole, weights
        self._pending.clear()
        self._offloaded.forget()
        self._inside = True
        try:
            watched = self._unused if self._probed else set()
            with self._reached(self._by_autograd | watched), torch.enable_grad(), self._offloaded.not_kept():
                self._capture.begin(examples, recording=recording)
                yield
        finally:
            self._inside = False
            self._capture.end()
            self._pending.clear()

    @contextmanager
    def _reached(self, names: Collection[str]) -> Iterator[None]:
        """Plain autograd reaches these parameters for a while; the gradients that they held are put back afterwards."""
        paths = [path for path, name in self._names.items() if name in names]
        held = {path: self.model.get_parameter(path).grad for path in paths}
        try:
            for path in paths:
                self.model.get_parameter(path).grad = None
            self._require({path: self.model.get_parameter(path).is_floating_point() for path in paths})
            yield
        finally:
            self._offloaded.forget()
            self._require(dict.fromkeys(paths, False))
            for path in paths:
                self.model.get_parameter(path).grad = held[path]

    def _arrive(self, name: str, contribution: Contribution) -> None:
        if name in self._by_autograd:
            return
        waiting = self._pending.setdefault(name, [])
        waiting.append(contribution)
        if len(waiting) == self._capture.uses[name]:
            self._consume(name, self._pending.pop(name))

    def _consume(self, name: str, contributions: list[Contribution]) -> None:
        found, batch = self._found, self._batch
        assert found is not None
        assert batch is not None
        if not batch.norms:
            found.squares[name] = squares_of_sum(contributions)
            return
        if self._weights is not None:
            batch.add(name, _summed(contributions, self._weights), weighted=True)
        if self._weights is not None and batch.totals is None:
            found.squares[name] = squares_of_sum(contributions)
            return
        if len(contributions) == 1:
            found.squares[name], total = contributions[0].squares_and_total()
        else:
            found.squares[name], total = squares_of_sum(contributions), _summed(contributions)
        batch.add(name, total, weighted=False)

    def _notice_late(self, examples: int) -> None:
        """Parameters that autograd reached and no rule, though the examples that were held against it did not use them.

        Raises ExamplesMixed where autograd's gradient is of several examples.
        """
        assert self._found is not None
        if not self._unused or not self._probed:
            return
        self._unused -= self._found.squares.keys() | self._pending.keys()
        late = self._unused & self._gradients().keys()
        if late:
            self._unused -= late
            self._by_autograd |= late
            self._run_one_by_one(self._without_rule())
            if examples > 1:
                raise ExamplesMixed(self._without_rule())

    def _without_rule(self) -> str:
        return f"No rule gives the gradient of {_list(sorted(self._by_autograd))}."

    def _finish(self) -> None:
        """Parameters whose every use did not send a gradient, and those that none of them did."""
        found, batch = self._found, self._batch
        assert found is not None
        assert batch is not None
        for name in list(self._pending):
            self._consume(name, self._pending.pop(name))
        gradients = self._gradients() if self._by_autograd else {}
        for name in self._by_autograd & gradients.keys():
            wide = gradients[name]
            found.squares[name] = wide.square().sum().view(1)
            if batch.norms:
                if self._weights is not None:
                    batch.add(name, wide * self._weights.to(wide), weighted=True)
                batch.add(name, wide.clone(), weighted=False)

    # --- verification

    def _learn(self, batch: Batch) -> None:
        """Before the first batch, before the first of several examples and of other keys: one example alone.

        The first with a target: one without has no gradient to hold the rules against.

        Which tensors the examples share shows beside a single one of the same length; other inputs may reach weights
        that were not used before.
        """
        self._reference_at = None
        several = self._ranks.any(examples_in(batch) > 1)
        another_kind = self._ranks.any(frozenset(batch) not in self._kinds)
        if not self._probed or another_kind or (several and not self._several_probed):
            first = first_labelled(batch)
            alone = slice_examples(batch, first, first + 1)
            self._probe(self._ranks.of_first(alone), verify=self._verify)  # FSDP averages the gradients of ranks
            self._several_probed = several and self._probed
            if self._probed:
                self._reference_at = first
                self._kinds.add(frozenset(batch))
            if self._ranks.together and self._probed:
                self._probe(alone, verify=False)  # the shapes at this rank's length
                self._probed = True

    def _probe(self, batch: Batch, *, verify: bool) -> None:
        """One example alone: note its shapes, and hold every rule against plain autograd."""
        self._found = found = Measurement(torch.empty(0), torch.empty(0))
        with self._reached(self._parameters() if verify else ()), self._listening(1, _Batch(1), recording=True):
            losses = self.reader.run(batch)
            self._capture.forward_phase = False
            if verify:
                losses.values.sum().backward()  # type: ignore[no-untyped-call]
                self._finish()
            reference = self._reference_squares() if verify else {}
        finite, counted = bool(torch.isfinite(losses.values).all()), bool((losses.tokens > 0).any())
        self._probed = finite and counted  # else the next batch is held against autograd
        if not self._probed:
            return
        if verify:
            self._reference = reference
            mine = {name: squares[0] for name, squares in found.squares.items()}
            self._by_autograd |= set(_differing(reference, mine, self._tolerance()))
            self._by_autograd |= reference.keys() - mine.keys()  # a gradient that is zero here may not be so elsewhere
            self._unused -= reference.keys() | mine.keys()
            if self._by_autograd:
                if self._ranks.together:
                    raise ConfigurationError(
                        f"No rule gives the gradient of {_list(sorted(self._by_autograd))}, and FSDP averages what "
                        "autograd gives over the ranks; profile this model in one process."
                    )
                self._run_one_by_one(self._without_rule())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; on a CPU torch has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


_STRAYED = "{} of the first example differ between batch and single run."

_TOO_LARGE = (
    "The memory does not hold the forward and backward pass of one example: shorten its sequence, switch on activation "
    "checkpointing, offload weights with accelerate, or keep sums in a folder; verify=False saves one whole gradient."
)


def _summed(contributions: list[Contribution], weights: Tensor | None = None) -> Tensor:
    total = contributions[0].total(weights)
    for contribution in contributions[1:]:
        total = total + contribution.total(weights)
    return total


def _joined(parts: list[Measurement]) -> Measurement:
    """The examples of micro-batches in a row."""
    if len(parts) == 1:
        return parts[0]
    joined = Measurement(torch.cat([part.losses for part in parts]), torch.cat([part.tokens for part in parts]))
    for name in {name: None for part in parts for name in part.squares}:
        joined.squares[name] = torch.cat(
            [part.squares[name] if name in part.squares else torch.zeros_like(part.losses) for part in parts]
        )
    return joined


def _differing(reference: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names whose norms disagree; tiny against the largest gradient of the model counts as zero."""
    largest = max((float(square) for square in reference.values()), default=0.0) ** 0.5
    names = []
    for name in reference.keys() | found.keys():
        one, two = (float(side[name]) ** 0.5 if name in side else 0.0 for side in (reference, found))
        if not abs(one - two) <= tolerance * (max(one, two) + 1e-3 * largest):
            names.append(name)
    return sorted(names)


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
