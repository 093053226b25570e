"""Which linear modules a model never calls, since it takes their weights and multiplies by itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

_TENSORS = {"weight", "bias"}
_HOOKED = "force_accelerate_hooks"
"""transformers' decorator of forwards, which names the children whose weights are taken without calling them."""


def never_called(model: nn.Module, name: str) -> bool:
    """Whether the module's parent reads its tensors alone: an adapter around it would get no gradient.

    Such are `out_proj` of `nn.MultiheadAttention`, `dt_proj` of Mamba, the projections of WavLM. The source of the
    parent's class tells: it says `self.out_proj.weight`, and nowhere `self.out_proj` without naming a tensor of it.
    Where there is no source to read, the module counts as called.
    """
    parent, _, child = name.rpartition(".")
    return child in _uncalled_by(type(model.get_submodule(parent)))  # type: ignore[arg-type]  # classes are hashable


@cache
def _uncalled_by(parent: type[nn.Module]) -> frozenset[str]:
    read, used, hooked = set[str](), set[str](), set[str]()
    for ancestor in parent.__mro__[: parent.__mro__.index(nn.Module)]:
        try:
            source = ast.parse(textwrap.dedent(inspect.getsource(ancestor)))
        except (OSError, TypeError, SyntaxError):  # defined in a session, compiled, or indented like a string
            return frozenset()
        taken = {
            id(node.value) for node in ast.walk(source) if isinstance(node, ast.Attribute) and node.attr in _TENSORS
        }
        for node in ast.walk(source):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                if id(node) in taken:
                    read.add(node.attr)
                elif isinstance(node.ctx, ast.Load):
                    used.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _HOOKED:
                hooked |= {str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)}
    return frozenset((read - used) | (read & hooked))
