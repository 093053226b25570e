"""The profiler: a context manager around a model that measures batches and writes a blueprint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence, Sized
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, CostModel, Granularity, Provenance, Statistic
from gradient_blueprints.training.profiling import provenance as provenances
from gradient_blueprints.training.profiling.coarser import coarser
from gradient_blueprints.training.profiling.digests import batch_digest, weights_digest
from gradient_blueprints.training.profiling.distributed import unwrapped
from gradient_blueprints.training.profiling.document import (
    DEFAULT_COSTS,
    DocumentSettings,
    batch_norms,
    build_blueprint,
    general_domain,
    precise_enough,
)
from gradient_blueprints.training.profiling.layers import Group, group_parameters
from gradient_blueprints.training.profiling.losses import (
    Batch,
    LossFunction,
    examples_in,
    on_device_of,
    slice_examples,
)
from gradient_blueprints.training.profiling.passes import GradientPass, Measurement
from gradient_blueprints.training.profiling.precision import Until
from gradient_blueprints.training.profiling.privacy import (
    Privacy,
    noised_means,
    private_blueprint,
    refuse_private_facts,
)
from gradient_blueprints.training.profiling.random_state import RandomState, seeded
from gradient_blueprints.training.profiling.state import (
    BatchRecord,
    DomainState,
    Key,
    ProfileState,
    Statistics,
    merge,
    ordered,
    refuse_mixed_statistics,
)
from gradient_blueprints.training.profiling.totals import BatchTotals, Place


class GradientProfiler:
    """Measures the gradients of a model, exactly and in one backward pass per batch.

    >>> with GradientProfiler(model, tokenizer) as profiler:        # doctest: +SKIP
    ...     for batch in validation:
    ...         profiler.step(batch, domain="general")
    >>> blueprint = profiler.blueprint("foundation-7b", 0.8)        # doctest: +SKIP

    `groups`: what a layer is: `tensor`, `submodule` or `block`.
    `statistics`: `examples` measures per-example norms only (cheapest), `batches` also batch norms,
    `all` also signal, first_order, tails and factors; these need float32 sums of the gradient's size,
    one per domain, one more for the general domain and one for the batch at hand.
    `sums`: where those are: `host` memory, the `device`, or files in the folder of a `Path`.
    `loss(outputs, batch)`: per-example losses of a model whose loss is not a mean cross-entropy.
    `micro_batch`: examples per forward pass; the batch statistics are of the whole batch all the same.
    Halved whenever the device runs out of memory.
    `verify`: hold the first example's norms against plain autograd, every parameter by name.
    `until`: how narrow the intervals must be for `run` to stop by itself; a number is `Until(width)`.
    `privacy`: publish noised norms of examples and nothing else (docs/privacy.md); implies `examples`.
    `digests`: name weights and batches by their SHA-256 in the provenance.
    `progress`: show a bar in `run`; None: where stderr is a terminal.

    Inside the context parameters require no gradient. Afterwards flags, mode and random state are
    as before, also after an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None = None,
        groups: Granularity = "submodule",
        seed: int = 0,
        *,
        statistics: Statistics = "all",
        statistic: Statistic | str = Statistic.MEAN,
        costs: CostModel = DEFAULT_COSTS,
        general: str | None = None,
        loss: LossFunction | None = None,
        micro_batch: int | None = None,
        sums: Place = "host",
        verify: bool = True,
        until: Until | float | None = None,
        privacy: Privacy | None = None,
        digests: bool = True,
        progress: bool | None = None,
    ) -> None:
        self.model = model = unwrapped(model)
        self.layers: list[Group] = group_parameters(model, groups)
        if not self.layers:
            raise ConfigurationError("The model has no parameters to profile.")
        self.statistics: Statistics = statistics if privacy is None else "examples"
        until = Until(until) if isinstance(until, int | float) else until
        if until is not None and self.statistics == "examples":
            raise ConfigurationError(
                "until looks at the norms of batches, which are not measured with privacy or statistics='examples'."
            )
        if privacy is not None and Statistic(statistic) is not Statistic.MEAN:
            raise ConfigurationError("A private gradient_norm is a mean; leave statistic as it is.")
        self._settings = DocumentSettings(Statistic(statistic), costs, general, seed, until)
        self._privacy, self._digests, self._progress = privacy, digests, progress
        self._released: dict[str, NDArray[np.float64]] | None = None
        self._weights_digest: str | None = None
        self._precise: dict[str, bool] = {}
        self._looked: dict[str, int] = {}
        self._pad_token_id = getattr(tokenizer, "pad_token_id", None)
        if self._pad_token_id == getattr(tokenizer, "eos_token_id", None):
            self._pad_token_id = None  # the end of a text is a target; padding shows in the attention mask
        self._loss, self._verify, self._micro_batch, self._sums = loss, verify, micro_batch, sums
        self._layer_of = {name: i for i, group in enumerate(self.layers) for name in group.parameters}
        self._state = ProfileState(tuple(group.id for group in self.layers))
        self._gradients: GradientPass | None = None
        self._generators: RandomState | None = None
        self._one_by_one: str | None = None
        self._seconds = 0.0

    # --- the context

    def __enter__(self) -> Self:
        if self._gradients is not None:
            raise ConfigurationError("This profiler is already entered.")
        if self._privacy is not None and any(module.training for module in self.model.modules()):
            raise ConfigurationError("A private profile needs model.eval(): no example may depend on another.")
        self._generators = RandomState()
        self._gradients = GradientPass(self.model, loss=self._loss, verify=self._verify, micro_batch=self._micro_batch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._gradients is not None
        assert self._generators is not None
        self._gradients.close()
        self._micro_batch = self._gradients.micro_batch
        self._one_by_one, self._gradients = self._gradients.one_by_one, None
        self._generators.restore()
        if error is None:
            self._note_weights()

    # --- measuring

    def run(self, batches: Iterable[Batch], domain: str = "general") -> int:
        """Measure batches, with a progress bar, until there are no more or `until` is reached; returns how many."""
        measured = 0
        total = len(batches) if isinstance(batches, Sized) else None
        hidden = None if self._progress is None else not self._progress
        with tqdm(total=total, desc=domain, unit="batch", disable=hidden) as bar:
            waiting = iter(batches)
            while not self.precise_enough(domain) and (batch := next(waiting, None)) is not None:
                bar.set_postfix(loss=f"{self.step(batch, domain):.3f}", refresh=False)
                bar.update()
                measured += 1
        return measured

    def step(self, batch: Batch, domain: str = "general", key: Key | None = None) -> float:
        """Measure one batch; returns its mean loss per target token.

        `key` names the batch among those of its domain (its number by default); shards give the
        number in the whole sequence. A batch with a non-finite loss or gradient is left out and named.
        """
        gradients = self._entered()
        state, key = self._opened(domain, key)
        began = time.perf_counter()
        labelled = gradients.with_labels(on_device_of(self.model, batch), self._pad_token_id)
        with seeded(self._settings.seed, domain, key):
            if self._privacy is not None:
                state.records[key] = self._measured_apart(gradients, labelled)
                mean = state.records[key].loss
            else:
                totals, size = self._totals(state, domain), gradients.micro_batch
                found = gradients.measure(labelled, norms=self.statistics != "examples", totals=totals)
                if gradients.micro_batch is not None and gradients.micro_batch != size:
                    state.halved[key] = gradients.micro_batch
                mean = self._record(state, key, found, totals, labelled)
        self._look(domain)
        self._seconds += time.perf_counter() - began
        return mean

    def backward(self, loss: Tensor, domain: str = "general", key: Key | None = None) -> float:
        """Measure the batch whose loss the caller has just computed: `loss = model(**batch).loss`.

        One call of the model, by keywords, with labels, and its loss as it is. Models whose examples
        must run one by one (see `step`) raise UncoveredParameter.
        """
        gradients = self._entered()
        if self._privacy is not None:
            raise ConfigurationError("A private profile measures examples one by one; use step(batch).")
        state, key = self._opened(domain, key)
        began = time.perf_counter()
        totals = self._totals(state, domain)
        batch = gradients.awaited
        found = gradients.measure_backward(loss, norms=self.statistics != "examples", totals=totals)
        mean = self._record(state, key, found, totals, batch)
        self._look(domain)
        self._seconds += time.perf_counter() - began
        return mean

    def _entered(self) -> GradientPass:
        if self._gradients is None:
            raise ConfigurationError("Use the profiler as a context: with GradientProfiler(model) as profiler: ...")
        if self._released is not None:
            raise ConfigurationError("The private blueprint is released; a new profile costs a new budget.")
        return self._gradients

    def _opened(self, domain: str, key: Key | None) -> tuple[DomainState, Key]:
        """The domain, and the key that its next batch has there."""
        state = self._state.domains.setdefault(domain, DomainState())
        for record in islice(state.records.values(), 1):  # absorbed ones may be others; all of a domain are alike
            refuse_mixed_statistics(domain, {record.statistics, self.statistics})
        if key is None:
            key = len(state.records) + len(state.skipped)
        if key in state.records or key in state.skipped:
            raise ConfigurationError(f"Batch {key!r} of domain {domain!r} was measured before.")
        return state, key

    def _totals(self, state: DomainState, domain: str) -> BatchTotals | None:
        if self.statistics != "all":
            return None
        wanted = domain in (self._settings.general, "general") or not self._has_general()
        whole = state.squared == len(state.records)  # once a batch is missing, the others' squares are of no use
        return BatchTotals(self.layers, self._layer_of, state, self._sums, squares=wanted and whole)

    def _record(
        self, state: DomainState, key: Key, found: Measurement, totals: BatchTotals | None, batch: Batch
    ) -> float:
        losses = found.losses.double().cpu().numpy()
        tokens = found.tokens.cpu().numpy()
        counted = tokens > 0  # an example without targets has no loss and no gradient
        squares = np.zeros((len(self.layers), len(losses)))
        for name, values in found.squares.items():
            squares[self._layer_of[name]] += values.double().cpu().numpy()
        fault = self._fault(losses, squares, found)
        if not fault and not counted.all():
            state.silent[key] = tuple(np.flatnonzero(~counted).tolist())
        if fault or not counted.any():
            state.skipped[key] = fault or "no target token"
            return float("nan")
        record = BatchRecord(losses[counted], tokens[counted], squares[:, counted], None, None, _length(batch))
        if self._digests:
            record.digest = batch_digest(batch)
        if self.statistics != "examples":
            norms = np.zeros(len(self.layers))
            for name, value in found.weighted_squares.items():
                norms[self._layer_of[name]] += float(value)
            record.norms = np.sqrt(norms)
        if totals is not None:
            record.counts = totals.commit()
        state.records[key] = record
        return record.loss

    def _measured_apart(self, gradients: GradientPass, batch: Batch) -> BatchRecord:
        """Every example alone, so that no rounding, and no fault, of one reaches another; all of them count."""
        examples = examples_in(batch)
        losses, tokens = np.zeros(examples), np.zeros(examples, np.int64)
        squares = np.zeros((len(self.layers), examples))
        for index in range(examples):
            found = gradients.measure(slice_examples(batch, index, index + 1), norms=False)
            losses[index], tokens[index] = np.nan_to_num(float(found.losses[0])), int(found.tokens[0])
            for name, values in found.squares.items():
                squares[self._layer_of[name], index] += float(values[0])
        return BatchRecord(losses, tokens, squares, None, None, _length(batch))

    def _look(self, domain: str) -> None:
        """After some of the batches, whether the domain is measured precisely enough."""
        until, state = self._settings.until, self._state.domains[domain]
        batches = len(state.records)
        if until is not None and self._looked.get(domain) != batches and until.looks_at(batches):
            self._looked[domain] = batches
            self._precise[domain] = precise_enough(batch_norms(state), self._settings)

    def precise_enough(self, domain: str = "general") -> bool:
        """Whether `until` was reached, when it was last looked; a loop of one's own breaks on it."""
        return self._precise.get(domain, False)

    def _note_weights(self) -> None:
        if self._digests and self._weights_digest is None:
            self._weights_digest = weights_digest(self.model)

    def _fault(self, losses: NDArray[np.float64], squares: NDArray[np.float64], found: Measurement) -> str | None:
        if not np.isfinite(losses).all():
            return "non-finite loss"
        bad = [self.layers[i].id for i in np.flatnonzero(~np.isfinite(squares).all(1))]
        for name, value in found.weighted_squares.items():
            if not bool(torch.isfinite(value)):
                bad.append(self.layers[self._layer_of[name]].id)
        return f"non-finite gradient in {', '.join(dict.fromkeys(bad[:3]))}" if bad else None

    def _has_general(self) -> bool:
        """Whether the general domain is known; one of which every batch was left out does not become it."""
        if self._settings.general is not None:
            return True
        return "general" in self._state.domains and bool(self._state.domains["general"].records)

    @property
    def one_by_one(self) -> str | None:
        """Why examples of this model run one at a time, which is slower; None when batches run whole."""
        return self._one_by_one if self._gradients is None else self._gradients.one_by_one

    # --- results

    def state(self) -> ProfileState:
        """What was learnt, for `merge`."""
        return self._state

    def absorb(self, *states: ProfileState) -> None:
        """Take in what other shards learnt; batches must not overlap.

        The states are taken over, not copied: whoever goes on measuring here changes them.
        """
        if self._privacy is not None:
            self._refuse_to_absorb(states)
        self._state = merge([self._state, *states])

    def _refuse_to_absorb(self, states: Sequence[ProfileState]) -> None:
        """Of a private profile the number of rows may depend on no row, and not change once they are noised."""
        if self._released is not None:
            raise ConfigurationError("The private blueprint is released; a new profile costs a new budget.")
        domains = [domain for state in states for domain in state.domains.values()]
        if any(
            domain.skipped or domain.silent or any(r.norms is not None for r in domain.records.values())
            for domain in domains
        ):
            raise ConfigurationError(
                "A private profile absorbs states of profilers with privacy only: others leave examples out."
            )

    def domain(self, name: str = "general") -> DomainState:
        """The records of one domain."""
        return self._state.domains[name]

    def table(self, domain: str = "general") -> NDArray[np.float64]:
        """T: the gradient norm of every (layer, example), in the order of the batches' keys, (layers, examples).

        Zero for an example without a target, so that columns are positions in the stream of batches. Only batches left
        out because they were not finite (`domain().skipped` names them) have no columns.
        """
        state = self._state.domains[domain]
        parts = []
        for key in ordered(state.records.keys() | state.silent.keys()):
            counted = state.counted(key)
            part = np.zeros((len(self.layers), len(counted)))
            if key in state.records:
                part[:, counted] = np.sqrt(state.records[key].example_squares)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def influences(self, domain: str = "general") -> NDArray[np.float64]:
        """J(z) = ||grad L(z)|| of every example over the whole model (section 4.3), as in `table`, (examples,)."""
        return np.asarray(np.sqrt((self.table(domain) ** 2).sum(0)))

    @property
    def has_factors(self) -> bool:
        """Whether there is anything for `save_factors`."""
        return self._privacy is None and any(state.factors for state in self._state.domains.values())

    def factors(self) -> dict[str, Tensor]:
        """Row and column means of the second moment of the batch gradient, float32.

        `{domain}/{parameter}/row` and `.../column`; a vector has its second moment as row and no
        column. The second moment of entry (i, j) is about row_i * column_j / mean(row).
        """
        if self._privacy is not None:
            raise ConfigurationError("A private profile publishes no factors: they are as fine as the gradient itself.")
        found: dict[str, Tensor] = {}
        for domain, state in self._state.domains.items():
            weight = sum(len(record.losses) ** 2 for record in state.records.values())
            for name, factors in state.factors.items():
                columns = 1 if factors.column is None else factors.column.shape[-1]
                found[f"{domain}/{name}/row"] = (factors.row / (weight * columns)).float()
                if factors.column is not None:
                    rows = factors.row.shape[-1]
                    found[f"{domain}/{name}/column"] = (factors.column / (weight * rows)).float()
        return found

    def save_factors(self, path: str | Path) -> Path:
        """Write `factors()` as safetensors; its metadata counts the batches of each domain, for merging."""
        counts = {
            domain: {"batches": len(state.records), "examples": state.examples}
            for domain, state in self._state.domains.items()
        }
        save_file(self.factors(), str(path), metadata={"gradient_blueprints": json.dumps(counts, sort_keys=True)})
        return Path(path)

    def blueprint(
        self,
        model_id: str,
        training_checkpoint: float,
        provenance: Provenance | None = None,
        *,
        groups: Granularity | None = None,
        resources: bool = False,
    ) -> Blueprint:
        """The document. What `provenance` leaves open is filled from what was run.

        `groups`: coarser layers than were profiled, by arithmetic and not by another run.
        `resources`: also seconds and peak memory, with which no two documents are the same
        (docs/decisions/0007). A private document is drawn once: asked for again it has the same noise.
        """
        self._note_weights()
        if self._privacy is not None:
            return self._private(model_id, training_checkpoint, provenance, groups, self._privacy)
        found = provenances.measured(self.model, self._state, self._settings.seed, self._weights_digest)
        if resources:
            found = found.model_copy(update={"resources": provenances.resources_used(self._seconds)})
        given = {} if provenance is None else provenance.model_dump(exclude_none=True)
        layers = self.layers if groups is None else group_parameters(self.model, groups)
        return build_blueprint(
            self._state if groups is None else coarser(self._state, self.layers, layers),
            layers,
            model_id=model_id,
            training_checkpoint=training_checkpoint,
            provenance=Provenance.model_validate(found.model_dump(exclude_none=True) | given),
            settings=self._settings,
        )

    def _private(
        self,
        model_id: str,
        training_checkpoint: float,
        provenance: Provenance | None,
        groups: Granularity | None,
        privacy: Privacy,
    ) -> Blueprint:
        refuse_private_facts(provenance)
        if groups is not None:
            raise ConfigurationError("A private profile has the layers that were noised; choose groups before it runs.")
        domains = {name: domain for name, domain in self._state.domains.items() if domain.records}
        if not domains:
            raise ConfigurationError("There is nothing to publish: no batch was profiled.")
        if self._released is None:
            self._released = noised_means({name: self.table(name).T for name in domains}, privacy)
        given = {} if provenance is None else provenance.model_dump(exclude_none=True)
        environment = provenances.environment(self.model, self._settings.seed, self._weights_digest)
        return private_blueprint(
            self._released,
            {name: domain.examples for name, domain in domains.items()},
            self.layers,
            privacy,
            general=general_domain(domains, self._settings.general),
            model_id=model_id,
            training_checkpoint=training_checkpoint,
            provenance=Provenance.model_validate(environment.model_dump(exclude_none=True) | given),
            costs=self._settings.costs,
        )


def _length(batch: Batch) -> int | None:
    ids = batch.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None
