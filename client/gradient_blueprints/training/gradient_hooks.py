"""An optimizer takes each gradient as soon as it is accumulated, and stands back while others measure gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakMethod

from torch import Tensor, nn


class GradientHook:
    """Hands a parameter to a method of its reader once its gradient is there.

    The reader is held weakly: a model would otherwise keep an optimizer that nobody has any more, which would go on
    taking the gradients from the next one.
    """

    def __init__(self, take: Callable[[nn.Parameter], None]) -> None:
        self._take = WeakMethod(take)
        self.resting = 0
        """How many measurements are under way, for which it leaves the gradients alone."""

    def __call__(self, parameter: Tensor) -> None:
        take = self._take()
        if take is not None and not self.resting:
            assert isinstance(parameter, nn.Parameter)
            take(parameter)

    @property
    def reader(self) -> object | None:
        """Whose method it is; None when it is gone."""
        take = self._take()
        return None if take is None else take.__self__  # type: ignore[attr-defined]  # a bound method


def readers_of(parameter: nn.Parameter) -> list[object]:
    """Who takes this parameter's gradients."""
    return [hook.reader for hook in _hooks(parameter) if hook.reader is not None]


@contextmanager
def unread(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While open, gradients stay where autograd puts them, whatever optimizer the model has."""
    hooks = [hook for parameter in parameters for hook in _hooks(parameter)]
    for hook in hooks:
        hook.resting += 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.resting -= 1


def _hooks(parameter: nn.Parameter) -> list[GradientHook]:
    hooks = parameter._post_accumulate_grad_hooks or {}  # torch has no public way to ask
    return [hook for hook in hooks.values() if isinstance(hook, GradientHook)]
