"""Profiles at chosen fractions of a training: what the callbacks of Trainer and Lightning have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradient_blueprints.canonical import digest_of
from gradient_blueprints.client import Client
from gradient_blueprints.errors import BlueprintsError, ConfigurationError
from gradient_blueprints.models import BLUEPRINT_FILE, Attachment, Blueprint, Provenance, Publication
from gradient_blueprints.training.profiling.losses import Batch, evaluating
from gradient_blueprints.training.profiling.profiler import GradientProfiler

FRACTIONS = (0.5, 0.8, 1.0)
FACTORS_FILE = "factors.safetensors"

Data = Mapping[str, Iterable[Batch]]

logger = logging.getLogger(__name__)


class CheckpointProfiler:
    """Profiles a model when its training passes a fraction, writes the documents, and publishes them.

    Nothing here ends a training: what goes wrong with the registry is logged, and the files stay for
    `publish_folder`.
    """

    def __init__(
        self,
        model_id: str,
        data: Data | Callable[[], Data] | None,
        fractions: Sequence[float],
        client: Client | None,
        options: Mapping[str, Any],
    ) -> None:
        if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
            raise ConfigurationError(f"The fractions {list(fractions)} are not all in (0, 1].")
        privacy = options.get("privacy")
        if privacy is not None and privacy.releases < len(set(fractions)):
            raise ConfigurationError(
                f"{len(set(fractions))} documents of the same data need a budget for as many: "
                f"Privacy(..., releases={len(set(fractions))})."
            )
        self.written: list[Path] = []
        self.unpublished: list[Path] = []
        self._model_id, self._data, self._client, self._options = model_id, data, client, dict(options)
        self._fractions = sorted(set(fractions))
        self._waiting = list(self._fractions)

    def start(self, step: int, steps: int) -> None:
        """A training begins, or goes on from a step; what lies behind was profiled then."""
        self._waiting = [fraction for fraction in self._fractions if fraction * steps > step + 1e-9]

    def due(self, step: int, steps: int) -> float | None:
        """The fraction that was just passed, the last one if there are several; each is due once."""
        passed = [fraction for fraction in self._waiting if step >= fraction * steps - 1e-9]
        self._waiting = self._waiting[len(passed) :]
        return passed[-1] if passed else None

    def profile(
        self, model: nn.Module, tokenizer: Any, fraction: float, folder: Path, *, seed: int, data: Data | None = None
    ) -> None:
        """Write the blueprint and the factors of the model as it is now into `folder`, and publish them."""
        given = self._data() if callable(self._data) else self._data
        work = given if given is not None else data
        if work is None:
            raise ConfigurationError("There is nothing to profile on: give the callback data={domain: batches}.")
        options = {"seed": seed} | self._options
        with evaluating(model), GradientProfiler(model, tokenizer, **options) as profiler:
            for domain, batches in work.items():
                profiler.run(batches, domain=domain)
        folder.mkdir(parents=True, exist_ok=True)
        blueprint = profiler.blueprint(
            self._model_id, round(fraction, 4), Provenance(notes=f"profiled in {folder.name}")
        )
        if profiler.has_factors:
            blueprint = with_factors(blueprint, profiler.save_factors(folder / FACTORS_FILE))
        self.written.append(blueprint.save_pretrained(folder))
        if self._client is not None:
            self._publish(self._client, folder)

    def _publish(self, client: Client, folder: Path) -> None:
        try:
            found = publish_folder(client, folder)
        except (BlueprintsError, OSError) as error:
            self.unpublished.append(folder)
            logger.warning(
                "%s was not published (%s); the training goes on. Later: publish_folder(client, %r)",
                folder / BLUEPRINT_FILE,
                error,
                str(folder),
            )
        else:
            logger.info("published %s at %s as version %d", found.model_id, found.training_checkpoint, found.version)


def with_factors(blueprint: Blueprint, path: Path) -> Blueprint:
    """The document that names the factors in the file `path` as its attachment."""
    content = path.read_bytes()
    attachment = Attachment(
        name=FACTORS_FILE, media_type="application/octet-stream", digest=digest_of(content), size=len(content)
    )
    return blueprint.model_copy(update={"attachments": (*(blueprint.attachments or ()), attachment)})


def publish_folder(client: Client, folder: str | Path) -> Publication:
    """Publish the blueprint that a callback wrote into a folder, its factors first.

    Repeating it is safe: the registry knows the bytes. Errors are those of `Client.publish_blueprint`.
    """
    blueprint = Blueprint.from_pretrained(folder)
    for attachment in blueprint.attachments or ():
        client.upload_blob(Path(folder) / attachment.name)
    return client.publish_blueprint(blueprint)
