"""The profiler: a context manager around a model that measures batches and writes a blueprint."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, CostModel, Provenance, Statistic
from gradient_blueprints.training.profiling.document import DEFAULT_COSTS, DocumentSettings, build_blueprint
from gradient_blueprints.training.profiling.layers import Granularity, Group, group_parameters
from gradient_blueprints.training.profiling.losses import Batch, LossFunction, with_labels
from gradient_blueprints.training.profiling.passes import GradientPass, Measurement
from gradient_blueprints.training.profiling.random_state import RandomState, seeded
from gradient_blueprints.training.profiling.state import (
    BatchRecord,
    DomainState,
    Key,
    ProfileState,
    merge,
    ordered,
)
from gradient_blueprints.training.profiling.totals import BatchTotals, Place

Statistics = Literal["examples", "batches", "all"]


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
    ) -> None:
        self.model = model
        self.layers: list[Group] = group_parameters(model, groups)
        if not self.layers:
            raise ConfigurationError("The model has no parameters to profile.")
        self.statistics = statistics
        self._settings = DocumentSettings(Statistic(statistic), costs, general, seed)
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
        self._batch_sizes: set[int] = set()
        self._lengths: set[int] = set()

    # --- the context

    def __enter__(self) -> Self:
        if self._gradients is not None:
            raise ConfigurationError("This profiler is already entered.")
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

    # --- measuring

    def step(self, batch: Batch, domain: str = "general", key: Key | None = None) -> float:
        """Measure one batch; returns its mean loss per target token.

        `key` names the batch among those of its domain (its number by default); shards give the
        number in the whole sequence. A batch with a non-finite loss or gradient is left out and named.
        """
        gradients = self._entered()
        state = self._state.domains.setdefault(domain, DomainState())
        key = self._key(state, domain, key)
        began = time.perf_counter()
        device = next(self.model.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        labelled = with_labels(moved, self._pad_token_id)
        with seeded(self._settings.seed, domain, key):
            totals, size = self._totals(state, domain), gradients.micro_batch
            found = gradients.measure(labelled, norms=self.statistics != "examples", totals=totals)
        if gradients.micro_batch is not None and gradients.micro_batch != size:
            state.halved[key] = gradients.micro_batch
        self._note_shape(labelled)
        mean = self._record(state, key, found, totals)
        self._seconds += time.perf_counter() - began
        return mean

    def backward(self, loss: Tensor, domain: str = "general", key: Key | None = None) -> float:
        """Measure the batch whose loss the caller has just computed: `loss = model(**batch).loss`.

        One call of the model, by keywords, with labels, and its loss as it is. Models whose examples
        must run one by one (see `step`) raise UncoveredParameter.
        """
        gradients = self._entered()
        state = self._state.domains.setdefault(domain, DomainState())
        key = self._key(state, domain, key)
        began = time.perf_counter()
        totals = self._totals(state, domain)
        found = gradients.measure_backward(loss, norms=self.statistics != "examples", totals=totals)
        mean = self._record(state, key, found, totals)
        self._seconds += time.perf_counter() - began
        return mean

    def _entered(self) -> GradientPass:
        if self._gradients is None:
            raise ConfigurationError("Use the profiler as a context: with GradientProfiler(model) as profiler: ...")
        return self._gradients

    @staticmethod
    def _key(state: DomainState, domain: str, key: Key | None) -> Key:
        if key is None:
            key = len(state.records) + len(state.skipped)
        if key in state.records or key in state.skipped:
            raise ConfigurationError(f"Batch {key!r} of domain {domain!r} was measured before.")
        return key

    def _note_shape(self, batch: Batch) -> None:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._batch_sizes.add(ids.shape[0])
            self._lengths.add(ids.shape[1])

    def _totals(self, state: DomainState, domain: str) -> BatchTotals | None:
        if self.statistics != "all":
            return None
        squares = domain in (self._settings.general, "general") or not self._has_general()
        return BatchTotals(self.layers, self._layer_of, state, self._sums, squares=squares)

    def _record(self, state: DomainState, key: Key, found: Measurement, totals: BatchTotals | None) -> float:
        losses = found.losses.double().cpu().numpy()
        tokens = found.tokens.cpu().numpy()
        counted = tokens > 0  # an example without targets has no loss and no gradient
        squares = np.zeros((len(self.layers), len(losses)))
        for name, values in found.squares.items():
            squares[self._layer_of[name]] += values.double().cpu().numpy()
        fault = self._fault(losses, squares, found)
        if fault or not counted.any():
            state.skipped[key] = fault or "no target token"
            return float("nan")
        record = BatchRecord(losses[counted], tokens[counted], squares[:, counted], None, None)
        if self.statistics != "examples":
            norms = np.zeros(len(self.layers))
            for name, value in found.weighted_squares.items():
                norms[self._layer_of[name]] += float(value)
            record.norms = np.sqrt(norms)
        if totals is not None:
            record.counts = totals.commit()
        state.records[key] = record
        return float((record.losses * record.tokens).sum() / record.tokens.sum())

    def _fault(self, losses: NDArray[np.float64], squares: NDArray[np.float64], found: Measurement) -> str | None:
        if not np.isfinite(losses).all():
            return "non-finite loss"
        bad = [self.layers[i].id for i in np.flatnonzero(~np.isfinite(squares).all(1))]
        for name, value in found.weighted_squares.items():
            if not bool(torch.isfinite(value)):
                bad.append(self.layers[self._layer_of[name]].id)
        return f"non-finite gradient in {', '.join(dict.fromkeys(bad[:3]))}" if bad else None

    def _has_general(self) -> bool:
        return self._settings.general is not None or "general" in self._state.domains

    @property
    def one_by_one(self) -> str | None:
        """Why examples of this model run one at a time, which is slower; None when batches run whole."""
        return self._one_by_one if self._gradients is None else self._gradients.one_by_one

    # --- results

    def state(self) -> ProfileState:
        """What was learnt, for `merge`."""
        return self._state

    def absorb(self, *states: ProfileState) -> None:
        """Take in what other shards learnt; batches must not overlap."""
        self._state = merge([self._state, *states])

    def domain(self, name: str = "general") -> DomainState:
        """The records of one domain."""
        return self._state.domains[name]

    def table(self, domain: str = "general") -> NDArray[np.float64]:
        """T: the gradient norm of every (layer, example), in the order of the batches' keys, (layers, examples)."""
        records = self._state.domains[domain].records
        squares = np.concatenate([records[key].example_squares for key in ordered(records)], axis=1)
        return np.asarray(np.sqrt(squares))

    def influences(self, domain: str = "general") -> NDArray[np.float64]:
        """J(z) = ||grad L(z)|| of every example over the whole model (section 4.3), (examples,)."""
        return np.asarray(np.sqrt((self.table(domain) ** 2).sum(0)))

    def factors(self) -> dict[str, Tensor]:
        """Row and column means of the second moment of the batch gradient, float32.

        `{domain}/{parameter}/row` and `.../column`; a vector has its second moment as row and no
        column. The second moment of entry (i, j) is about row_i * column_j / mean(row).
        """
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

    def blueprint(self, model_id: str, training_checkpoint: float, provenance: Provenance | None = None) -> Blueprint:
        """The document. What `provenance` leaves open is filled from what was run."""
        measured = self._provenance()
        given = {} if provenance is None else provenance.model_dump(exclude_none=True)
        merged = Provenance.model_validate(measured.model_dump(exclude_none=True) | given)
        return build_blueprint(
            self._state,
            self.layers,
            model_id=model_id,
            training_checkpoint=training_checkpoint,
            provenance=merged,
            settings=self._settings,
        )

    def _provenance(self) -> Provenance:
        domains = {name: state for name, state in self._state.domains.items() if state.records}
        parameter = next(self.model.parameters())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        resources: dict[str, Any] = {"seconds": round(self._seconds, 3), "peak_memory_bytes": peak}
        if torch.cuda.is_available():
            resources["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        return Provenance(
            profiler=f"gradient-blueprints {metadata.version('gradient-blueprints')}",
            batches=sum(len(state.records) for state in domains.values()),
            batch_size=max(self._batch_sizes, default=None),
            examples=sum(state.examples for state in domains.values()),
            tokens=sum(state.tokens for state in domains.values()),
            sequence_length=max(self._lengths, default=None),
            loss={name: float(f"{state.loss:.6g}") for name, state in domains.items()},
            seed=self._settings.seed,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=_device_name(parameter.device),
            versions={"python": platform.python_version(), "torch": torch.__version__, **_version("transformers")},
            resources=resources,
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}
