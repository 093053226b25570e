"""Training whole layers with other people's tools: Axolotl and LLaMA-Factory, each as far as it can say it.

Axolotl trains any set of whole tensors; LLaMA-Factory the first or the last blocks with some of their modules. Neither
trains single coordinates, which is what a blueprint is best at (docs/adapting.md). torchtune is left out: its last
release is of April 2025, and its recipes take neither form.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.bridges.tensors import tensor_shares
from gradient_blueprints.training.selection import BYTES_PER_DENSE_PARAMETER, Budget, Selection
from gradient_blueprints.training.selection.listed_tensors import listing, tied_names

EXHAUSTIVE = 10
"""Names of modules, within the blocks and outside, of which to_llama_factory tries all combinations: 1024."""

Masks = npt.NDArray[np.bool_]


def to_axolotl(selection: Selection, model: nn.Module) -> list[str]:
    """Axolotl's `unfrozen_parameters`: one pattern for each layer that the selection trains whole.

    >>> yaml.safe_dump({"unfrozen_parameters": to_axolotl(selection, model)})  # doctest: +SKIP

    Axolotl matches patterns from the start of a parameter's name, takes every dot for a literal one (an escaped dot
    would be escaped twice and match nothing), and trains what any of them matches
    (axolotl-ai-cloud/axolotl, src/axolotl/utils/freeze.py). A tied tensor goes by its first name, the one that Axolotl
    sees. Where patterns of layers would train something that the selection keeps out, there is one for each tensor.
    Raises ConfigurationError for a selection of coordinates, since Axolotl can freeze whole tensors and leading rows,
    not entries, and where nothing of the model is selected, since Axolotl takes an empty list for full fine-tuning.
    """
    patterns = []
    names = [name for name, _ in model.named_parameters()]
    wanted = _whole_parameters(selection, model)
    for layer in selection.layers:
        if layer.fraction == 1:
            if layer.id in names:
                patterns.append(f"^{layer.id}$")
            elif any(name.startswith(f"{layer.id}.") for name in names):
                patterns.append(f"^{layer.id}.")
    unfrozen = {name for name in names if any(axolotl_matches(pattern, name) for pattern in patterns)}
    if unfrozen != wanted:  # a layer in another, a tied or frozen tensor, or a name with the signs of a pattern
        patterns = [f"^{name}$" for name in names if name in wanted]
    return patterns


def axolotl_matches(pattern: str, parameter: str) -> bool:
    """Axolotl's own rule for a pattern without a range of rows."""
    return re.match(re.sub(r"\.(?!\+)", r"\\.", pattern), parameter) is not None


def _whole_parameters(selection: Selection, model: nn.Module) -> set[str]:
    """Names, as of `named_parameters`, of the tensors that the selection trains, as `apply_selection` reads it."""
    partial = [layer.id for layer in selection.layers if 0 < layer.fraction < 1]
    if partial:
        raise ConfigurationError(
            f"The selection trains a part of {partial[0]}; tools that freeze need whole layers: select(unit='layer')."
        )
    fractions = {layer.id: layer.fraction for layer in selection.layers}
    kept_out = {name for name, chosen in selection.parts.items() if not len(chosen)}
    whole = {
        names[0]
        for names, _ in tied_names(model)
        if (found := listing(names, fractions.keys())) is not None
        and fractions[found[1]] == 1
        and found[0] not in kept_out
    }
    if not whole:
        raise ConfigurationError(
            f"The selection for {selection.model_id} trains nothing in this model: are its tensors named otherwise?"
        )
    return whole


@dataclass(frozen=True)
class FreezeTuning:
    """LLaMA-Factory's freeze arguments, and how much of what was wanted they can say."""

    arguments: dict[str, str | int]
    """For its YAML file, as they are."""
    parameters: tuple[str, ...]
    """Names of the parameters that it will train."""
    trained: int
    share: float
    """Share of the blueprint's gradient norm in them."""


def to_llama_factory(blueprint: Blueprint, model: nn.Module, budget: float | Budget = 0.1) -> FreezeTuning:
    """The best freeze tuning that LLaMA-Factory can express within a budget of parameters.

    It trains the first or last n blocks, in each the same modules, and modules outside the blocks; a parameter is
    trained when its name contains `.INDEX.MODULE` or the name of such a module
    (hiyouga/LLaMA-Factory, src/llamafactory/model/adapter.py, `_setup_freeze_tuning`, and hparams/finetuning_args.py).
    All combinations are tried, of more than EXHAUSTIVE module names those that a greedy search finds; the one with the
    largest sum of gradient-norm shares wins, the smaller one in a tie. A layer's share is spread over its tensors by
    size. `select(unit="layer")` is not bound to such shapes: compare.
    Raises ConfigurationError for models of images or sound: it keeps their towers frozen, by names of its own for each
    kind of model (model_utils/visual.py, `get_forbidden_modules`).
    """
    if any(getattr(model.config, f"{kind}_config", None) is not None for kind in ("vision", "audio")):
        raise ConfigurationError(
            "LLaMA-Factory keeps parts of models of images or sound frozen whatever is named, so what it would train "
            "cannot be told; take select(unit='layer', model=model) and to_axolotl instead."
        )
    config = getattr(model.config, "text_config", model.config)
    blocks = next(
        (n for key in ("num_hidden_layers", "num_layers", "n_layer") if (n := getattr(config, key, None))), None
    )
    if not blocks:
        raise ConfigurationError("The model's configuration does not say how many blocks it has; nor could the tool.")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    values = tensor_shares(blueprint, model)
    inside = sorted({name.split(".0.")[-1].split(".")[0] for name in sizes if ".0." in name})
    outside = sorted({name.split(".")[-2] for name in sizes if not re.search(r"\.\d+\.", name) and "." in name})
    budget = budget if isinstance(budget, Budget) else Budget.fraction(budget)
    capacity = budget.coordinates(sum(sizes.values()), BYTES_PER_DENSE_PARAMETER)

    order = list(sizes)
    worth = np.array([[values[name], sizes[name]] for name in order])  # (parameters, 2)

    def holds(fragment: str) -> list[bool]:
        return [fragment in name for name in order]

    of_blocks = [np.array([holds(f".{i}.{module}") for i in range(blocks)]) for module in inside]
    of_outside = [np.array([holds(module)] * blocks) for module in outside]
    reached = {  # by the first blocks, by the last blocks: (modules, count - 1, parameters)
        sign: np.array([*(np.logical_or.accumulate(held[::-sign]) for held in of_blocks), *of_outside])
        for sign in (-1, 1)
    }
    if len(inside) + len(outside) <= EXHAUSTIVE:
        tried = _subsets(len(inside) + len(outside))
    else:
        starts = itertools.product(reached.values(), range(blocks), range(len(inside)))
        tried = sorted({_greedy(masks[:, count], first, worth, capacity) for masks, count, first in starts})
    best: tuple[float, float] | None = None
    for names in tried:
        if not any(name < len(inside) for name in names):  # it wants a module of the blocks
            continue
        for sign, masks in reached.items():
            trained = np.logical_or.reduce(masks[list(names)])  # (count - 1, parameters)
            for count, (value, size) in enumerate(trained @ worth, start=1):
                if size <= capacity and (best is None or (value, -size) > best):
                    best, chosen = (value, -size), (sign * count, names, trained[count - 1])
    if best is None:
        raise ConfigurationError(f"{capacity:,} parameters pay for no module of one block: raise the budget.")
    layers, names, mask = chosen
    modules = [inside[name] for name in names if name < len(inside)]
    extra = [outside[name - len(inside)] for name in names if name >= len(inside)]
    arguments: dict[str, str | int] = {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": layers,
        "freeze_trainable_modules": ",".join(modules),
    }
    if extra:
        arguments["freeze_extra_modules"] = ",".join(extra)
    parameters = tuple(name for name, held in zip(order, mask, strict=True) if held)
    share = min(1.0, sum(values[name] for name in parameters))
    return FreezeTuning(arguments, parameters, sum(sizes[name] for name in parameters), share)


def _subsets(count: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(count + 1) for chosen in itertools.combinations(range(count), size)]


def _greedy(masks: Masks, first: int, worth: npt.NDArray[np.float64], capacity: int) -> tuple[int, ...]:
    """`first`, then whichever adds the most worth for its size, while one fits. `masks`: (modules, parameters)."""
    chosen, held = [first], masks[first]
    while True:
        gains = (masks & ~held) @ worth  # (modules, 2)
        left = capacity - held @ worth[:, 1]
        fitting = np.flatnonzero((gains[:, 0] > 0) & (gains[:, 1] <= left))
        if not len(fitting):
            return tuple(sorted(chosen))
        best = int(fitting[np.argmax(gains[fitting, 0] / gains[fitting, 1])])
        chosen.append(best)
        held = held | masks[best]
