"""Layers in coarser groups: by kind, by band of depth, and finer layers put together to the layer they are parts of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gradient_blueprints.models import LayerKind
from gradient_blueprints.statistics_models import Level

DEPTH_BANDS = 8
SEPARATOR = "."
COARSER = (Level.KIND_IN_DEPTH_BAND, Level.KIND, Level.DEPTH_BAND)

# What ids of common models say, for documents that do not state kind and depth. The first that matches counts: the
# norm before an attention block is a norm, and so is `post_attention_layernorm`.
_KINDS = (
    (LayerKind.NORMALIZATION, re.compile(r"norm|(^|[._])ln(_|\d|[._]|$)")),
    (LayerKind.EMBEDDING, re.compile(r"embed|(^|[._])w[tp]e([._]|$)")),
    (LayerKind.HEAD, re.compile(r"(^|[._])(lm_)?head([._]|$)")),
    (LayerKind.FEED_FORWARD, re.compile(r"mlp|ffn|feed_?forward|(^|[._])fc\d?([._]|$)")),
    (LayerKind.ATTENTION, re.compile(r"att(entio)?n|(^|[._])([qkvo]|c)_proj([._]|$)")),
)
_NUMBER = re.compile(r"(?:^|[._])(\d+)(?=[._]|$)")


def kind_of(layer_id: str, stated: str | None) -> str:
    """The stated kind, else what the id says, else `other`.

    >>> kind_of("attn.0", None), kind_of("model.layers.3.post_attention_layernorm", None)
    ('attention', 'normalization')
    """
    if stated is not None:
        return stated
    lowered = layer_id.lower()
    return str(next((kind for kind, pattern in _KINDS if pattern.search(lowered)), LayerKind.OTHER))


def depth_of(layer_id: str, stated: int | None) -> int | None:
    """The stated depth, else the first number that stands alone in the id.

    >>> depth_of("model.layers.3.mlp", None), depth_of("embed_tokens", None)
    (3, None)
    """
    if stated is not None:
        return stated
    found = _NUMBER.search(layer_id)
    return int(found.group(1)) if found else None


def groups(
    level: Level, layers: Sequence[str], kinds: Sequence[str | None], depths: Sequence[int | None]
) -> dict[str, list[int]]:
    """The positions of the layers of each group.

    A band holds an equal share of the depths from 0 to the largest, 8 of them at most; what has no depth (embedding,
    head) is a band of its own.
    """
    found = [depth_of(layer, depth) for layer, depth in zip(layers, depths, strict=True)]
    deepest = max((depth for depth in found if depth is not None), default=0)
    bands = min(DEPTH_BANDS, deepest + 1)
    grouped: dict[str, list[int]] = {}
    for position, (layer, kind, depth) in enumerate(zip(layers, kinds, found, strict=True)):
        band = "outside" if depth is None else f"band {depth * bands // (deepest + 1) + 1} of {bands}"
        name = {
            Level.LAYER: layer,
            Level.KIND_IN_DEPTH_BAND: f"{kind_of(layer, kind)}, {band}",
            Level.KIND: kind_of(layer, kind),
            Level.DEPTH_BAND: band,
        }[level]
        grouped.setdefault(name, []).append(position)
    return dict(sorted(grouped.items()))


def ancestors(layer_id: str) -> list[str]:
    """The layers that it may be a part of, innermost first.

    >>> ancestors("attn.0.q")
    ['attn.0', 'attn']
    """
    cuts = [position for position, character in enumerate(layer_id) if character == SEPARATOR]
    return [layer_id[:cut] for cut in reversed(cuts)]


def parts(wanted: Mapping[str, int | None], available: Mapping[str, int | None]) -> dict[str, list[str]]:
    """Which of the `available` layers make up each `wanted` layer that is not among them: attn.0.q, attn.0.k: attn.0.

    The outermost descendants, in the order of their ids. The mappings hold parameter counts: where all are known and
    those of the parts do not add up to that of the whole, the whole is left out.
    """
    inside: dict[str, list[str]] = {}
    for name in sorted(available):
        outer = ancestors(name)
        missing = [whole for whole in outer if whole in wanted and whole not in available]
        for whole in missing:
            between = outer[: outer.index(whole)]
            if not any(other in available for other in between):
                inside.setdefault(whole, []).append(name)
    return {whole: names for whole, names in inside.items() if _complete(wanted[whole], [available[n] for n in names])}


def _complete(expected: int | None, counts: Sequence[int | None]) -> bool:
    known = [count for count in counts if count is not None]
    return expected is None or len(known) < len(counts) or sum(known) == expected
