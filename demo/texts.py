"""Real text that every machine with this environment has: code, English prose, and licences.

Code is the standard library's sources. English is the prose of documentation strings of installed packages and of
Python's language reference. Legal text is the licences of the installed packages. Files, and for prose and licences
paragraphs, are dealt to training and held-out by a hash of their own content, so the parts never share one.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

PROSE_PACKAGES = ("numpy", "torch", "transformers", "sqlalchemy", "scipy", "matplotlib", "fastapi", "celery")
ENOUGH_PROSE = 2_500_000  # characters; reading stops there
ENOUGH_CODE = 4_000_000
_WORD = re.compile(r"[A-Za-z][a-z']+[,;:.]?$")


@dataclass(frozen=True)
class Domain:
    """Text of one kind, in three parts that share no document."""

    name: str
    source: str
    """Where it comes from, for people."""
    training: str
    validation: str
    heldout: str


def code() -> Domain:
    """Sources of the standard library; a document is a module."""
    return _divide("code", "sources of Python's standard library", code_modules())


def code_modules() -> Iterator[str]:
    """The modules of the standard library, up to as much as is enough."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(folder.rglob("*.py")) if not _left_out(path.relative_to(folder))]
    # Not in the order of the alphabet: encodings alone would fill the sample.
    modules.sort(key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())
    return _up_to(map(_read, modules), ENOUGH_CODE)


def english() -> Domain:
    """Prose of documentation strings and of the language reference; a document is a paragraph."""
    return _divide(
        "english", "documentation of Python and of installed packages", _up_to(_prose_paragraphs(), ENOUGH_PROSE)
    )


def legal(packages: Container[str] | None = None) -> Domain:
    """Licences that the installed packages carry, or those of them that are named; a paragraph is a document."""
    seen: set[str] = set()

    def paragraphs() -> Iterator[str]:
        files = {
            Path(str(file.locate()))
            for distribution in metadata.distributions()
            if packages is None or str(distribution.metadata["Name"]).lower() in packages
            for file in distribution.files or ()
            if re.search(r"licen[sc]e|copying|notice|authors", file.name, re.IGNORECASE) and file.suffix != ".py"
        }
        for path in sorted(path for path in files if path.is_file()):
            for paragraph in _read(path).split("\n\n"):
                plain = " ".join(paragraph.split())
                if len(plain) > 120 and plain not in seen:
                    seen.add(plain)
                    yield plain

    return _divide("legal", "licences of the installed packages", paragraphs())


def _left_out(path: Path) -> bool:
    return bool(
        {"test", "tests", "idlelib", "site-packages", "encodings", "pydoc_data", "turtledemo", "lib2to3"}
        & {*path.parts}
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _prose_paragraphs() -> Iterator[str]:
    seen: set[str] = set()
    for text in _documentation():
        for paragraph in re.split(r"\n\s*\n", text):
            plain = " ".join(paragraph.split())
            words = plain.split(" ")
            prose = sum(bool(_WORD.match(word)) for word in words) > 0.75 * len(words)
            if prose and 15 <= len(words) <= 300 and plain not in seen:
                seen.add(plain)
                yield plain


def _documentation() -> Iterator[str]:
    topics = util.find_spec("pydoc_data.topics")
    if topics is not None and topics.origin is not None:
        yield from _strings(Path(topics.origin), any_string=True)
    for package in PROSE_PACKAGES:
        spec = util.find_spec(package)
        if spec is not None and spec.origin is not None:
            for path in sorted(Path(spec.origin).parent.rglob("*.py")):
                yield from _strings(path)


def _strings(path: Path, *, any_string: bool = False) -> Iterator[str]:
    if any_string:  # a module that is nothing but text, in strings of every spelling
        tree = ast.parse(_read(path))
        yield from (
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
    else:  # parsing a whole package takes ten times as long, and what is no prose is sieved out anyway
        yield from re.findall(r'"""(.+?)"""', _read(path), re.DOTALL)


def _up_to(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters < 0:
            return


def _divide(name: str, source: str, documents: Iterable[str]) -> Domain:
    """Deal documents to the parts, 80, 10 and 10 in a hundred."""
    parts: dict[str, list[str]] = {"training": [], "validation": [], "heldout": []}
    for document in documents:
        number = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 10
        parts["training" if number < 8 else "validation" if number == 8 else "heldout"].append(document)
    return Domain(name, source, **{part: "\n\n".join(texts) for part, texts in parts.items()})


DOMAINS: dict[str, Callable[[], Domain]] = {"code": code, "english": english, "legal": legal}
