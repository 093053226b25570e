"""Blueprint files on this machine: reading them, and the paper's Appendix A.2 over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import BLUEPRINT_FILE, Blueprint
from gradient_blueprints.statistics_models import TableRow


def read_blueprint(path: str | Path) -> Blueprint:
    """The document in a .json or .csv file, or in the gradient_blueprint.json of a folder.

    Raises FileNotFoundError, and ConfigurationError or InvalidDocument that names what is wrong in it.
    """
    place = Path(path)
    if place.is_dir():
        place = place / BLUEPRINT_FILE
    try:
        if place.suffix.lower() == ".csv":
            return Blueprint.from_csv(place.read_text(encoding="utf-8"))
        return Blueprint.from_json(place.read_bytes())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{place} is not UTF-8: {error.reason} at byte {error.start}.") from None
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "/".join(map(str, fault["loc"])) or "the document"
        raise ConfigurationError(f"{place} is not a blueprint: {where}: {fault['msg']}.") from None


def table_of_files(
    paths: Iterable[str | Path], wanted: Callable[[Blueprint], bool] = lambda blueprint: True
) -> Iterator[TableRow]:
    """The rows of all files that are wanted, in their order; a document that is there twice counts once.

    Where the keys (model, checkpoint, layer) of two documents collide both rows are kept and flagged. One document is
    held at a time, and the keys of all.
    """
    files = list(dict.fromkeys(paths))
    keys: Counter[tuple[str, float, str]] = Counter()
    first: dict[str, str | Path] = {}
    for path in files:
        blueprint = read_blueprint(path)
        if wanted(blueprint) and first.setdefault(blueprint.digest, path) == path:
            keys.update((blueprint.model_id, blueprint.training_checkpoint, layer.id) for layer in blueprint.layers)
    for path in first.values():
        blueprint = read_blueprint(path)
        for layer in blueprint.layers:
            key = (blueprint.model_id, blueprint.training_checkpoint, layer.id)
            yield TableRow(
                model_id=blueprint.model_id,
                training_checkpoint=blueprint.training_checkpoint,
                layer=layer,
                collision=keys[key] > 1,
                digest=blueprint.digest,
            )
