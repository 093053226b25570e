"""What one use of a parameter adds to its gradient, per example, without writing the gradients out.

Each kind knows the squared norms of the per-example gradients, their weighted sum, and (for parameters
that are used more than once, such as a tied embedding) its inner products with other contributions.
Letters: n examples, t positions, d inputs, p outputs; X (n, t, d) inputs, G (n, t, p) output gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FEWEST_HALVED = 32  # positions: of fewer the halves cost more than they spare
_CHUNK_ELEMENTS = 1 << 24
"""Largest temporary of a Gram matrix or per-example gradient, in elements (64 MiB of float32)."""

_BLOCK = 1 << 18


class Contribution(ABC):
    """Per-example gradients of one parameter from one use, of shape (n, *shape), kept in factors."""

    examples: int
    shape: torch.Size

    @abstractmethod
    def squares(self) -> Tensor:
        """||g_i||^2 of every example, (n,), float32 or wider."""

    @abstractmethod
    def total(self, weights: Tensor | None = None) -> Tensor:
        """sum_i w_i g_i, of the parameter's shape; without weights the plain sum."""

    def squares_and_total(self) -> tuple[Tensor, Tensor]:
        """Both, for kinds that get the one from the other more cheaply."""
        return self.squares(), self.total()

    @abstractmethod
    def gradient(self, example: int) -> Tensor:
        """The gradient of one example, written out."""

    def inner(self, other: Contribution) -> Tensor:
        """<g_i, g'_i> of every example, (n,); the slow way, always right."""
        return torch.stack([(self.gradient(i) * other.gradient(i)).sum() for i in range(self.examples)])


def squares_of_sum(contributions: Sequence[Contribution]) -> Tensor:
    """|| sum_c g_i^c ||^2 of every example: the squares and twice every cross term."""
    squares = contributions[0].squares()
    for index, contribution in enumerate(contributions[1:], start=1):
        squares = squares + contribution.squares()
        for earlier in contributions[:index]:
            squares = squares + 2 * _inner(earlier, contribution)
    return squares.clamp_min(0)


def _inner(one: Contribution, two: Contribution) -> Tensor:
    if isinstance(one, Lookup) and isinstance(two, Outer):
        return two.inner(one)
    return one.inner(two)


class Outer(Contribution):
    """A matrix applied at every position: g_i = G_i^T X_i (p, d), or its transpose for a weight stored (d, p)."""

    def __init__(self, inputs: Tensor, gradients: Tensor, shape: torch.Size, *, transposed: bool = False) -> None:
        left, right = (inputs, gradients) if transposed else (gradients, inputs)
        self.left, self.right = _accumulable(left), _accumulable(right)  # (n, t, rows), (n, t, columns)
        self.shape = shape
        self.examples = inputs.shape[0]

    def ghost_is_cheaper(self) -> bool:
        """By compute: three quarters of two Gram matrices take 3/4 t^2 (d + p), the gradient itself t d p."""
        _, positions, rows = self.left.shape
        columns = self.right.shape[2]
        return 3 * positions * (rows + columns) <= 4 * rows * columns

    def squares(self) -> Tensor:
        if self.ghost_is_cheaper():
            return self._gram_squares()
        return torch.stack([square(self._written_out(i)) for i in range(self.examples)])

    def total(self, weights: Tensor | None = None) -> Tensor:
        left = self.left if weights is None else self.left * weights.to(self.left).view(-1, 1, 1)
        return (left.flatten(0, 1).T @ self.right.flatten(0, 1)).view(self.shape)

    def squares_and_total(self) -> tuple[Tensor, Tensor]:
        _, positions, rows = self.left.shape
        columns = self.right.shape[2]
        if self.examples == 1:
            total = self.total()
            return square(total).view(1), total
        if 3 * positions * (rows + columns) <= rows * columns:
            return self.squares(), self.total()
        # Writing each gradient out costs what the batch gradient costs and gives it for one more addition.
        total = self._written_out(0)
        squares = [square(total)]
        gradient = torch.empty_like(total)
        for i in range(1, self.examples):
            torch.mm(self.left[i].T, self.right[i], out=gradient)
            squares.append(square(gradient))
            total += gradient
        return torch.stack(squares), total.view(self.shape)

    def gradient(self, example: int) -> Tensor:
        return self._written_out(example).view(self.shape)

    def _written_out(self, example: int) -> Tensor:
        return self.left[example].T @ self.right[example]  # (rows, columns)

    def inner(self, other: Contribution) -> Tensor:
        if isinstance(other, Outer):
            return self._gram_inner(other)
        if isinstance(other, Lookup):
            # A tied head: sum over positions t, s of G_head[t, id_s] <h_t, b_s>.
            ids = other.ids.clamp_min(0)  # (n, s)
            picked = torch.gather(self.left, 2, ids.unsqueeze(1).expand(-1, self.left.shape[1], -1))  # (n, t, s)
            return (picked * (self.right @ other.gradients.mT)).sum((1, 2))  # rows of padding are zero in `gradients`
        return super().inner(other)

    def _gram_squares(self) -> Tensor:
        """The inner product with itself: Gram matrices are symmetric, one quarter of each stands for another."""
        if self.left.shape[1] < _FEWEST_HALVED:
            return self._gram_inner(self)
        first, second = (
            Outer(right, left, self.shape)
            for left, right in zip(self.left.chunk(2, 1), self.right.chunk(2, 1), strict=True)
        )
        return first._gram_inner(first) + 2 * first._gram_inner(second) + second._gram_inner(second)

    def _gram_inner(self, other: Outer) -> Tensor:
        """<A^T B, C^T D> = <A C^T, B D^T>, a few examples at a time."""
        step = max(1, _CHUNK_ELEMENTS // max(1, self.left.shape[1] * other.left.shape[1]))
        parts = [
            (
                (self.left[i : i + step] @ other.left[i : i + step].mT)
                * (self.right[i : i + step] @ other.right[i : i + step].mT)
            ).sum((1, 2))
            for i in range(0, self.examples, step)
        ]
        return torch.cat(parts)


class Lookup(Contribution):
    """Rows picked by id: row v of g_i is the sum of G_i[t] over the positions with that id.

    Positions with a negative id (padding_idx, whose row never receives a gradient) are left out.
    """

    def __init__(self, ids: Tensor, gradients: Tensor, shape: torch.Size) -> None:
        gradients = _accumulable(gradients)
        self.ids = ids  # (n, t)
        self.gradients = gradients * (ids >= 0).unsqueeze(2)  # (n, t, d)
        self.shape = shape
        self.examples = ids.shape[0]

    def squares(self) -> Tensor:
        return self.inner(self)

    def total(self, weights: Tensor | None = None) -> Tensor:
        rows = self.gradients if weights is None else self.gradients * weights.to(self.gradients).view(-1, 1, 1)
        out = torch.zeros(self.shape, dtype=rows.dtype, device=rows.device)
        return out.index_add_(0, self.ids.clamp_min(0).flatten(), rows.flatten(0, 1))

    def gradient(self, example: int) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.gradients.dtype, device=self.gradients.device)
        return out.index_add_(0, self.ids[example].clamp_min(0), self.gradients[example])

    def inner(self, other: Contribution) -> Tensor:
        if isinstance(other, Lookup):
            return torch.stack([self._inner_of(other, i) for i in range(self.examples)])
        return super().inner(other)

    def _inner_of(self, other: Lookup, example: int) -> Tensor:
        """Sum both sides by id first: linear in the positions, where comparing all pairs is quadratic."""
        here = self.ids[example]
        if other is self:
            distinct, index = torch.unique(here, return_inverse=True)
            return square(self._summed(index, distinct.numel(), example))
        distinct, index = torch.unique(torch.cat([here, other.ids[example]]), return_inverse=True)
        mine = self._summed(index[: here.numel()], distinct.numel(), example)
        return (mine * other._summed(index[here.numel() :], distinct.numel(), example)).sum()

    def _summed(self, index: Tensor, rows: int, example: int) -> Tensor:
        gradients = self.gradients[example]
        out = torch.zeros(rows, gradients.shape[1], dtype=gradients.dtype, device=gradients.device)
        return out.index_add_(0, index, gradients)


class Dense(Contribution):
    """Small parameters (biases, norm weights): the per-example gradients themselves, (n, *shape)."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = _accumulable(gradients)
        self.examples = gradients.shape[0]
        self.shape = gradients.shape[1:]

    def squares(self) -> Tensor:
        return self.gradients.flatten(1).square().sum(1)

    def total(self, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.gradients.sum(0)
        total: Tensor = torch.tensordot(weights.to(self.gradients), self.gradients, 1)
        return total

    def gradient(self, example: int) -> Tensor:
        return self.gradients[example]


class Computed(Contribution):
    """Per-example gradients that are computed one at a time when asked for (large parameters without a rule)."""

    def __init__(self, compute: Callable[[int], Tensor], examples: int, shape: torch.Size) -> None:
        self.compute, self.examples, self.shape = compute, examples, shape

    def squares(self) -> Tensor:
        return torch.stack([square(self.gradient(i)) for i in range(self.examples)])

    def total(self, weights: Tensor | None = None) -> Tensor:
        total = self.gradient(0) * (1 if weights is None else weights[0])
        for i in range(1, self.examples):
            total = total + self.gradient(i) * (1 if weights is None else weights[i])
        return total

    def squares_and_total(self) -> tuple[Tensor, Tensor]:
        total = self.gradient(0)
        squares = [square(total)]
        for i in range(1, self.examples):
            gradient = self.gradient(i)
            squares.append(square(gradient))
            total = total + gradient
        return torch.stack(squares), total

    def gradient(self, example: int) -> Tensor:
        return _accumulable(self.compute(example))


def _accumulable(tensor: Tensor) -> Tensor:
    """Half precisions go to float32 before they are squared or summed: float16 squares overflow."""
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def square(tensor: Tensor) -> Tensor:
    """Sum of squares; long float32 vectors in blocks, since one running sum over 10^7 terms drifts by 1e-4."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _BLOCK:
        return torch.dot(flat, flat)
    return torch.stack([torch.dot(block, block) for block in torch.split(flat, _BLOCK)]).sum()
