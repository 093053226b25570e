"""A profiler's state as a file: tensors as safetensors, the rest as JSON in its metadata, nothing that can run.

    save_state(profiler.state(), "part-0.safetensors")                  # on each machine
    profiler.absorb(*map(load_state, parts))                            # on one of them

A file read back is the state that was written, to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.histograms import Counts, MagnitudeHistogram
from gradient_blueprints.training.profiling.state import BatchRecord, DomainState, Factors, ProfileState

FORMAT = "gradient_blueprints_profile_state_1"


def save_state(state: ProfileState, path: str | Path, notes: Mapping[str, Any] | None = None) -> Path:
    """Write a state, and `notes` of plain JSON data beside it; 4 bytes for each sum and square that it holds."""
    tensors: dict[str, Tensor] = {}
    domains = []
    for index, (name, domain) in enumerate(state.domains.items()):
        described, held = _write_domain(domain)
        domains.append({"name": name} | described)
        tensors |= {f"{index}/{key}": tensor.detach().contiguous() for key, tensor in held.items()}
    header = {"layers": state.layers, "domains": domains, "notes": dict(notes or {})}
    save_file(tensors, str(path), metadata={FORMAT: json.dumps(header)})
    return Path(path)


def load_state(path: str | Path) -> ProfileState:
    """The state that a file holds, on the CPU; ConfigurationError when it holds none."""
    header = _read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            domains = {
                described["name"]: _read_domain(described, _Tensors(file, f"{index}/"))
                for index, described in enumerate(header["domains"])
            }
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{Path(path).name} holds no whole profile state: {error}.") from error
    return ProfileState(tuple(header["layers"]), domains)


def load_notes(path: str | Path) -> dict[str, Any]:
    """The notes that were written beside a state."""
    notes: dict[str, Any] = _read_header(path)["notes"]
    return notes


def _read_header(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header: Any = json.loads((file.metadata() or {})[FORMAT])
    except (OSError, SafetensorError, LookupError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{Path(path).name} is no profile state of this version: {error}.") from error
    match header:
        case {"layers": [*layers], "domains": [*_], "notes": {}} if all(isinstance(layer, str) for layer in layers):
            return dict(header)
    raise ConfigurationError(f"{Path(path).name} is no profile state of this version: its header lacks a part.")


class _Tensors:
    """The tensors of one domain, each read when it is asked for."""

    def __init__(self, file: Any, prefix: str) -> None:
        self._file, self._prefix = file, prefix
        names = file.keys()  # a method alone: a safetensors file is no dict
        self._names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._prefix + name)
        return tensor

    def array(self, name: str) -> NDArray[Any]:
        return np.asarray(self[name].numpy())

    def below(self, folder: str) -> dict[str, Tensor]:
        return {name.removeprefix(folder): self[name] for name in self._names if name.startswith(folder)}


def _write_domain(domain: DomainState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is JSON of a domain, and its tensors."""
    records = list(domain.records.values())
    described = {
        "batches": [
            [key, len(r.losses), r.length, r.digest, r.norms is not None, r.counts is not None]
            for key, r in domain.records.items()
        ],
        "skipped": list(domain.skipped.items()),
        "halved": list(domain.halved.items()),
        "silent": list(domain.silent.items()),
        "histograms": bool(domain.histograms),
        "squared": domain.squared,
    }
    tensors = {f"sums/{name}": tensor for name, tensor in domain.sums.items()}
    tensors |= {f"squares/{name}": tensor for name, tensor in domain.squares.items()}
    for name, factors in domain.factors.items():
        tensors[f"row/{name}"] = factors.row
        if factors.column is not None:
            tensors[f"column/{name}"] = factors.column
    if records:
        _put(tensors, "losses", [r.losses for r in records])
        _put(tensors, "tokens", [r.tokens for r in records])
        _put(tensors, "example_squares", [r.example_squares for r in records], axis=1)  # (layers, examples)
        _put(tensors, "norms", [r.norms for r in records if r.norms is not None])
        counts = [counted for r in records if r.counts is not None for counted in r.counts]
        _put(tensors, "counts", [np.array([first for first, _ in counts], np.int64)])
        _put(tensors, "counts_lengths", [np.array([len(values) for _, values in counts], np.int64)])
        _put(tensors, "counts_values", [values for _, values in counts])
    if domain.histograms:
        _put(tensors, "bins", [h.counts for h in domain.histograms])
        _put(tensors, "bin_sums", [h.sums for h in domain.histograms])
        _put(tensors, "top", [h.top for h in domain.histograms])
        _put(tensors, "top_lengths", [np.array([len(h.top) for h in domain.histograms], np.int64)])
    return described, tensors


def _put(tensors: dict[str, Tensor], name: str, arrays: list[NDArray[Any]], axis: int = 0) -> None:
    if arrays:
        tensors[name] = torch.from_numpy(np.concatenate(arrays, axis=axis))


def _read_domain(described: Mapping[str, Any], tensors: _Tensors) -> DomainState:
    columns = tensors.below("column/")
    domain = DomainState(
        records=_read_records(described["batches"], tensors) if described["batches"] else {},
        histograms=_read_histograms(tensors) if described["histograms"] else [],
        sums=tensors.below("sums/"),
        squares=tensors.below("squares/"),
        factors={name: Factors(row, columns.get(name)) for name, row in tensors.below("row/").items()},
        skipped=dict(described["skipped"]),
        halved=dict(described["halved"]),
        silent={key: tuple(map(int, found)) for key, found in described.get("silent", ())},  # older files have none
    )
    domain.squared = described["squared"] if "squared" in described else _squared(domain)
    if domain.squared < len(domain.records):  # of older files: they are of no use
        domain.squared, domain.squares = 0, {}
    return domain


def _squared(domain: DomainState) -> int:
    """Of how many batches the squares of an older file are: of all if they add up to the factors, which always are."""
    total = sum(float(squares.sum(dtype=torch.float64)) for squares in domain.squares.values())
    expected = sum(float(factors.row.sum()) for factors in domain.factors.values())
    return len(domain.records) if math.isclose(total, expected, rel_tol=1e-4) else 0


def _read_records(batches: list[list[Any]], tensors: _Tensors) -> dict[int | str, BatchRecord]:
    examples = np.cumsum([batch[1] for batch in batches])[:-1]
    losses = np.split(tensors.array("losses"), examples)
    tokens = np.split(tensors.array("tokens"), examples)
    squares = np.split(tensors.array("example_squares"), examples, axis=1)
    layers = len(squares[0])
    with_norms = sum(batch[4] for batch in batches)
    norms = iter(tensors.array("norms").reshape(with_norms, layers) if with_norms else ())
    counts = iter(_read_counts(tensors)) if any(batch[5] for batch in batches) else iter(())
    records: dict[int | str, BatchRecord] = {}
    for index, (key, _, length, digest, has_norms, has_counts) in enumerate(batches):
        records[key] = BatchRecord(
            losses[index],
            tokens[index],
            np.ascontiguousarray(squares[index]),
            next(norms) if has_norms else None,
            [next(counts) for _ in range(layers)] if has_counts else None,
            length,
            digest,
        )
    return records


def _read_counts(tensors: _Tensors) -> list[tuple[int, Counts]]:
    values = np.split(tensors.array("counts_values"), np.cumsum(tensors.array("counts_lengths"))[:-1])
    return list(zip(map(int, tensors.array("counts")), values, strict=True))


def _read_histograms(tensors: _Tensors) -> list[MagnitudeHistogram]:
    lengths = tensors.array("top_lengths")
    counts, sums = (tensors.array(name).reshape(len(lengths), -1) for name in ("bins", "bin_sums"))
    tops = np.split(tensors.array("top"), np.cumsum(lengths)[:-1])
    return [MagnitudeHistogram(*parts) for parts in zip(counts, sums, tops, strict=True)]
