"""Which layers move on which examples: the table T of section 4.4, its structure, and what to choose by it.

T is layers × examples, T_ij = ||gradient of example j's mean loss in layer i||, as `GradientProfiler.table()` gives it
from one pass per batch: the paper's tensor (eq. 32) at the level of groups, where its entries can be held.
Any product of a layer's size and an example's loudness is a table of rank 1, so "low rank" alone says nothing:
`structure` puts the spectrum beside what tables without any interaction give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.knapsack import knapsack
from gradient_blueprints.theory import gain_exponent, joint_gain
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.state import ordered

Table = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]

_STARTS = 8
_ROUNDS = 50
_FEWEST = 10
_ROUNDING = 1e-12


def block_table(profiler: GradientProfiler, domain: str = "general") -> Table:
    """T of layers × data blocks, a block being a batch: the norm of the batch gradient, (layers, batches).

    Exact, from the same pass. Noise of single examples cancels within a block, so it is not the mean of their columns;
    that is `pooled`. Needs `statistics="batches"` or `"all"`.
    """
    records = profiler.domain(domain).records
    columns = [records[key].norms for key in ordered(records)]
    if not columns or any(column is None for column in columns):
        raise ConfigurationError('Norms of batches need GradientProfiler(statistics="batches") and a measured batch.')
    return np.stack([column for column in columns if column is not None], axis=1)


def pooled(table: Table, blocks: Sequence[int]) -> Table:
    """T of layers × blocks from examples: the root mean square over each block, blocks in ascending order.

    >>> pooled(np.array([[3.0, 3.0, 1.0]]), [0, 0, 1])
    array([[3., 1.]])
    """
    labels = np.asarray(blocks)
    _checked(table)
    if labels.shape != (table.shape[1],):
        raise ConfigurationError(f"{labels.shape} block labels for {table.shape[1]} examples")
    return np.stack([np.sqrt((table[:, labels == block] ** 2).mean(1)) for block in np.unique(labels)], axis=1)


# --- structure


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a table, and how many of them count."""

    values: Vector
    """Descending, (min(layers, examples),)."""
    rank_one: float
    """Share of the energy Σσ² in the first."""
    effective_rank: float
    """exp of the entropy of σ/Σσ (Roy and Vetterli 2007): 1 for rank 1, the number of values when all are equal."""

    @classmethod
    def of(cls, table: Table) -> Spectrum:
        values: Vector = np.asarray(np.linalg.svd(table, compute_uv=False), np.float64)
        energy = float((values**2).sum())
        shares = values[values > 0] / values.sum() if energy else np.ones(1)
        entropy = float(-(shares * np.log(shares)).sum())
        return cls(values, float(values[0] ** 2) / energy if energy else 1.0, float(np.exp(entropy)))


@dataclass(frozen=True)
class Structure:
    """The spectrum of T beside two nulls, before and after what rows and columns alone explain is taken out."""

    layers: int
    examples: int
    raw: Spectrum
    """Of T itself."""
    additive: float
    """Share of ΣT² that row means + column means - mean explain: no interaction at all, yet nearly all of `raw`."""
    half_normal: float
    """Energy in the first singular value of |N(0, 1)| entries of the same shape; tends to 2/π."""
    centred: Spectrum
    """Of log T with row and column means taken out: only the interaction of layers with examples is left."""
    interaction: float
    """Share of the variance of log T that is interaction."""
    shuffled: Spectrum
    """First null, the additive model of log T: the same residuals dealt out at random. Means over the draws."""
    shuffled_largest: float
    """95 % quantile of the largest singular value in those draws."""
    half_normal_centred: Spectrum
    """Second null: log |N(0, 1)| entries, centred likewise. Means over the draws."""
    modes: int
    """Singular values of `centred` above those of the same rank in 95 % of the shuffled tables, counted until the
    first that is not (parallel analysis, Horn 1965): interaction that is no noise."""

    def __str__(self) -> str:
        centred, null, normal = self.centred, self.shuffled, self.half_normal_centred
        return (
            f"{self.layers} layers × {self.examples} examples\n"
            f"T: rank 1 holds {self.raw.rank_one:.1%} of the energy, the additive model {self.additive:.1%}, a "
            f"half-normal table {self.half_normal:.1%}; effective rank {self.raw.effective_rank:.1f}\n"
            f"log T, double-centred ({self.interaction:.1%} of its variance): the first value holds "
            f"{centred.rank_one:.1%}, of shuffled residuals {null.rank_one:.1%}, of a half-normal table "
            f"{normal.rank_one:.1%}\n"
            f"effective rank {centred.effective_rank:.1f}, shuffled {null.effective_rank:.1f}, half-normal "
            f"{normal.effective_rank:.1f}; modes above the shuffled null: {self.modes}"
        )


def structure(table: Table, *, draws: int = 20, seed: int = 0) -> Structure:
    """How much of T is more than "this layer is large and that example is loud".

    Layers and examples with a zero are left out: they have no logarithm. What is left of log T is no interaction where
    it is of the size of rounding errors. Raises ConfigurationError when fewer than two layers or examples are left.
    """
    _checked(table)
    positive = table[(table > 0).any(1)][:, (table > 0).any(0)]
    positive = positive[(positive > 0).all(1)]
    if min(positive.shape) < 2:
        raise ConfigurationError("The table has fewer than two layers or examples without a zero.")
    logs = np.log(positive)
    residuals = double_centred(logs)
    if np.sqrt((residuals**2).mean()) < _ROUNDING * max(1.0, float(np.abs(logs).max())):
        residuals = np.zeros_like(residuals)
    rng = np.random.default_rng(seed)
    shuffled = [_shuffled(residuals, rng) for _ in range(draws)]
    normal = [np.abs(rng.standard_normal(positive.shape)) for _ in range(draws)]
    null = [Spectrum.of(draw) for draw in shuffled]
    above = Spectrum.of(residuals).values > np.quantile([draw.values for draw in null], 0.95, axis=0)
    return Structure(
        layers=positive.shape[0],
        examples=positive.shape[1],
        raw=Spectrum.of(positive),
        additive=1 - float((double_centred(positive) ** 2).sum() / (positive**2).sum()),
        half_normal=float(np.mean([Spectrum.of(draw).rank_one for draw in normal])),
        centred=Spectrum.of(residuals),
        interaction=float((residuals**2).sum() / ((logs - logs.mean()) ** 2).sum()) if np.ptp(logs) else 0.0,
        shuffled=_mean_spectrum(null),
        shuffled_largest=float(np.quantile([draw.values[0] for draw in null], 0.95)),
        half_normal_centred=_mean_spectrum([Spectrum.of(double_centred(np.log(draw))) for draw in normal]),
        modes=len(above) if above.all() else int(above.argmin()),
    )


def double_centred(table: Table) -> Table:
    """What row and column means leave: T_ij - T_i. - T_.j + T_..

    >>> double_centred(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([[0., 0.],
           [0., 0.]])
    """
    return np.asarray(table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean())


def _shuffled(residuals: Table, rng: np.random.Generator) -> Table:
    """The residuals dealt out at random, centred again, with the energy that centring took given back."""
    dealt = double_centred(rng.permuted(residuals.ravel()).reshape(residuals.shape))
    energy = float((dealt**2).sum())
    return dealt * np.sqrt(float((residuals**2).sum()) / energy) if energy else dealt


def _mean_spectrum(spectra: Sequence[Spectrum]) -> Spectrum:
    return Spectrum(
        np.mean([spectrum.values for spectrum in spectra], axis=0),
        float(np.mean([spectrum.rank_one for spectrum in spectra])),
        float(np.mean([spectrum.effective_rank for spectrum in spectra])),
    )


# --- choosing layers and data together


@dataclass(frozen=True)
class CoSelection:
    """Layers S and examples D chosen together, and what T says of them."""

    layers: npt.NDArray[np.int64]
    """Rows of the table, ascending."""
    examples: npt.NDArray[np.int64]
    """Columns of the table, ascending. Of `GradientProfiler.table()` these are positions in the stream of batches, as a
    data set's `select` and torch's `Subset` take them, if it came in the data set's order and no batch was left out as
    not finite."""
    k: float
    """Share of the parameters that S holds, at most what was asked for."""
    q: float
    """Share of the examples."""
    share: float
    """Σ_{S, D} T / Σ T, the predicted share of the full gain (eq. 34)."""
    independent: float
    """The same if layers and examples were chosen apart and did not interact: (share of S over all examples)
    × (share of D over all layers), each the best that its budget allows."""
    bound: float
    """No pair within the budgets has a larger share: the smaller of those two factors (as long as the knapsack over
    all examples is solved exactly, which it is for the layers of real models)."""


def co_select(
    table: Table, k: float, q: float, sizes: Sequence[int] | None = None, *, starts: int = _STARTS, seed: int = 0
) -> CoSelection:
    """Layers S with at most a share `k` of the parameters and a share `q` of the examples D, with Σ_{S,D} T large.

    For given D the best S is a 0/1 knapsack over the layers' row sums, for given S the best D the examples with the
    largest column sums: both exact, taken in turn until nothing changes. The sum never falls, so it ends in a pair
    that neither side can better alone. Both together are NP-hard (the densest bipartite subgraph): several starts are
    tried, and `bound` says how far off the optimum it can be at most.

    `sizes`: parameters of each row; without them each row counts as one. Raises ConfigurationError where k or q are too
    small for one layer or one example.
    """
    _checked(table)
    if not (0 < k <= 1 and 0 < q <= 1):
        raise ConfigurationError(f"k = {k} and q = {q} are shares in (0, 1]")
    weights = [1] * table.shape[0] if sizes is None else list(sizes)
    if len(weights) != table.shape[0] or sum(weights) <= 0:
        raise ConfigurationError(f"{len(weights)} sizes for {table.shape[0]} layers")
    capacity, count = int(k * sum(weights) + 1e-9), int(q * table.shape[1] + 1e-9)
    total = float(table.sum())
    if total <= 0 or count == 0:
        raise ConfigurationError("The table is zero, or q leaves no example.")

    def best_layers(examples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.flatnonzero(knapsack(table[:, examples].sum(1).tolist(), weights, capacity).taken)

    def best_examples(layers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.sort(np.argsort(-table[layers].sum(0), kind="stable")[:count])

    rng = np.random.default_rng(seed)
    everything = np.arange(table.shape[1])
    by_layers, by_examples = best_layers(everything), best_examples(np.arange(table.shape[0]))
    if not table[by_layers].any():
        smallest = min(weight for weight, row in zip(weights, table, strict=True) if row.any())
        raise ConfigurationError(
            f"k = {k} pays for {capacity:,} of {sum(weights):,} parameters, and the smallest layer has {smallest:,}: "
            "raise k"
        )
    tried = [everything, by_examples, *(rng.choice(table.shape[1], count, replace=False) for _ in range(starts))]
    best: tuple[float, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
    for examples in tried:
        held = -1.0
        for _ in range(_ROUNDS):
            layers = best_layers(examples)
            examples = best_examples(layers)
            found = float(table[np.ix_(layers, examples)].sum())
            if found <= held * (1 + 1e-12):
                break
            held = found
        if best is None or held > best[0] * (1 + 1e-12):
            best = held, layers, examples
    assert best is not None
    share, layers, examples = best
    margins = float(table[by_layers].sum()) / total, float(table[:, by_examples].sum()) / total
    return CoSelection(
        layers=layers,
        examples=examples,
        k=sum(weights[i] for i in layers) / sum(weights),
        q=len(examples) / table.shape[1],
        share=share / total,
        independent=margins[0] * margins[1],
        bound=min(margins),
    )


# --- the paper's exponents


def rank_size_exponent(influences: Vector, share: float = 0.25) -> float:
    """β of J(z_(j)) ~ j^-β (eq. 28): Hill's mean excess of the logarithms over the top `share`, at least 10 examples.

    An estimate with error β/√n at best; a set of a few dozen examples gives one digit. It always gives a number,
    a power law or not: half-normal influences give 0.33 at the top quarter.
    """
    ordered_down = np.sort(np.asarray(influences, np.float64))[::-1]
    top = max(_FEWEST, int(share * len(ordered_down)))
    if len(ordered_down) <= top or ordered_down[top] <= 0:
        raise ConfigurationError(f"{len(ordered_down)} influences are too few for a tail of {top}, or zero.")
    return float(np.log(ordered_down[:top] / ordered_down[top]).mean())


def predicted_share(k: float, q: float, alpha: float, beta: float) -> float:
    """k^γ·q^δ (eq. 35) with γ = 1/(1+α), δ = 1/(1+β), the exponents of the tails of coordinates and examples.

    >>> round(predicted_share(0.2, 0.3, 0.5, 0.5), 3)
    0.153
    """
    return joint_gain(k, q, gain_exponent(alpha), gain_exponent(beta))


def _checked(table: Table) -> None:
    if table.ndim != 2 or not np.isfinite(table).all() or (table < 0).any():
        raise ConfigurationError("T is a table of layers × examples, its entries finite and not negative.")
