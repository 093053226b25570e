"""Validation text of a domain: read, shuffled by documents, tokenised and packed into sequences of one length.

Documents follow each other with the end-of-text token between them, and the stream is cut every `sequence_length`
tokens. So a document may go on in the next sequence, and a sequence may hold the end of one document and the start of
the next: as in pre-training, and unlike padding, which would make the batch's norm depend on how short documents are.
Nothing is repeated, and a rest too short for a batch is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.sources import SourceRefused, file_digest

PIECE_CHARACTERS = 16_384  # a plain file is shuffled in pieces of whole lines, so that its head is not all that is seen


@dataclass(frozen=True)
class PackedText:
    sequences: list[list[int]]  # (batches * batch_size, sequence_length)
    documents: int  # of which a part at least is in the sequences
    digest: str  # of the file


def pack(
    path: Path,
    *,
    field: str,
    encode: Callable[[str], list[int]],
    separator: int | None,
    sequence_length: int,
    batch_size: int,
    batches: int,
    seed: int,
) -> PackedText:
    """Up to `batches` whole batches of sequences, drawn by `seed`; SourceRefused when there is not one."""
    documents = list(_documents(path, field))
    random.Random(seed).shuffle(documents)  # noqa: S311 - a sample, not a secret
    wanted = batches * batch_size * sequence_length
    tokens: list[int] = []
    used = 0
    for document in documents:
        if len(tokens) >= wanted:
            break
        tokens += encode(document)
        if separator is not None:
            tokens.append(separator)
        used += 1
    whole = min(batches, len(tokens) // (sequence_length * batch_size)) * batch_size
    if whole == 0:
        raise SourceRefused(
            f"{path.name!r} gives {len(tokens):,} tokens, and one batch of {batch_size} sequences of {sequence_length} "
            f"needs {batch_size * sequence_length:,}: give more text, or a smaller batch_size or sequence_length"
        )
    starts = range(0, whole * sequence_length, sequence_length)
    sequences = [tokens[start : start + sequence_length] for start in starts]
    return PackedText(sequences, used, file_digest(path))


def _documents(path: Path, field: str) -> Iterator[str]:
    match path.suffix.lower():
        case ".txt":
            yield from _pieces(path)
        case ".jsonl":
            yield from _members(path, field)
        case other:
            raise SourceRefused(f"{path.name!r} ends in {other or 'nothing'}; text is read from .txt and .jsonl files")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceRefused(f"{path.name!r} is not UTF-8: line {number}, byte {error.start}") from None


def _pieces(path: Path) -> Iterator[str]:
    piece = ""
    for _, line in _lines(path):
        if piece and len(piece) + len(line) > PIECE_CHARACTERS:
            yield piece
            piece = ""
        piece += line
        while len(piece) > PIECE_CHARACTERS:  # a single line longer than a piece
            yield piece[:PIECE_CHARACTERS]
            piece = piece[PIECE_CHARACTERS:]
    if piece.strip():
        yield piece


def _members(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceRefused(f"{path.name!r}, line {number}, is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            has = ", ".join(sorted(map(str, entry))[:10]) if isinstance(entry, dict) else type(entry).__name__
            raise SourceRefused(f"{path.name!r}, line {number}, has no text in the member {field!r}; it has {has}")
        if entry[field].strip():
            yield entry[field]
