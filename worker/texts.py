"""Validation text of a domain: read, shuffled by documents, tokenised, and packed or padded into sequences.

Packed, documents follow each other with the end-of-text token between them, and the stream is cut every
`sequence_length` tokens. So a document may go on in the next sequence, and a sequence may hold the end of one document
and the start of the next: as in pre-training. Padded, each document is one sequence, cut at `sequence_length`; what is
beyond is not read, and a batch's norm then depends on how long its documents are.

Nothing is repeated, and a rest too short for a batch is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow
import pyarrow.parquet

from worker.sources import SourceRefused, file_digest, raise_fault_of_machine

PIECE_CHARACTERS = 16_384  # a plain file is shuffled in pieces of whole lines, so that its head is not all that is seen
PARQUET_ROWS = 1_024  # read at a time
MAX_GROUP_BYTES = 1 << 30  # of the text of a Parquet row group, unpacked
SHORTEST = 2  # tokens of a sequence that predicts anything

Format = Literal["text", "jsonl", "parquet"]
FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class PackedText:
    sequences: list[list[int]]  # batches * batch_size of them, of sequence_length tokens or, padded, of at most so many
    documents: int  # of which a part at least is in the sequences
    digest: str  # of the file

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


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
    text_format: Format | None = None,
    packing: Literal["packed", "padded"] = "packed",
    max_tokens: int | None = None,
) -> PackedText:
    """Up to `batches` whole batches of sequences, drawn by `seed`; SourceRefused when there is not one."""
    documents = (encode(document) for document in _shuffled(path, text_format, field, seed))
    arrange = _pack if packing == "packed" else _pad
    sequences, begins, seen = arrange(documents, separator, sequence_length, batches * batch_size, max_tokens)
    whole = len(sequences) // batch_size * batch_size
    if whole == 0:
        limit = "" if max_tokens is None else f", of which max_tokens lets through {max_tokens:,}"
        batch = f"one batch of {batch_size} sequences of {sequence_length} needs {sequence_length * batch_size:,}"
        if packing == "padded":
            batch = f"one batch needs {batch_size} documents of at least {SHORTEST} tokens"
        raise SourceRefused(
            f"{path.name!r} gives {seen:,} tokens{limit}, and {batch}: "
            "give more text, or a smaller batch_size or sequence_length"
        )
    return PackedText(sequences[:whole], sum(begin < whole for begin in begins), file_digest(path))


def _pack(
    documents: Iterator[list[int]], separator: int | None, length: int, most: int, max_tokens: int | None
) -> tuple[list[list[int]], Sequence[int], int]:
    """The sequences, the number of the one in which each document begins, and how many tokens the documents had."""
    wanted = most * length if max_tokens is None else min(most, max_tokens // length) * length
    tokens: list[int] = []
    begins: list[int] = []
    while len(tokens) < wanted and (document := next(documents, None)) is not None:
        begins.append(len(tokens) // length)
        tokens += document
        if separator is not None:
            tokens.append(separator)
    whole = min(len(tokens), wanted) // length * length
    return [tokens[start : start + length] for start in range(0, whole, length)], begins, len(tokens)


def _pad(
    documents: Iterator[list[int]], separator: int | None, length: int, most: int, max_tokens: int | None
) -> tuple[list[list[int]], Sequence[int], int]:
    """Likewise, each document a sequence of its own."""
    sequences: list[list[int]] = []
    seen = 0
    left = most * length if max_tokens is None else max_tokens
    while len(sequences) < most and (document := next(documents, None)) is not None:
        seen += len(document)
        sequence = document[:length]
        if len(sequence) > left:
            break
        if len(sequence) >= SHORTEST:
            sequences.append(sequence)
            left -= len(sequence)
    return sequences, range(len(sequences)), seen


# --- documents


def format_of(name: str) -> Format | None:
    """What a file is by its name, which may be a whole source."""
    return FORMATS.get(PurePosixPath(name).suffix.lower())


def _shuffled(path: Path, text_format: Format | None, field: str, seed: int) -> Iterator[str]:
    """The documents of a file in an order that `seed` draws; of Parquet the row groups, and the rows within each."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    groups: Iterator[Callable[[], Iterator[str]]]
    match text_format or format_of(path.name):
        case "text":
            groups = iter([partial(_pieces, path)])
        case "jsonl":
            groups = iter([partial(_members, path, field)])
        case "parquet":
            groups = _row_groups(path, field, draw)
        case _:
            raise SourceRefused(
                f"{path.name!r} ends in {path.suffix or 'nothing'}; text is read from .txt, .jsonl and .parquet files, "
                "or as DataSource(format=...) says"
            )
    for read in groups:
        documents = list(read())
        draw.shuffle(documents)
        yield from documents


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
        whole = (len(piece) - 1) // PIECE_CHARACTERS * PIECE_CHARACTERS  # of a single line longer than a piece
        for start in range(0, whole, PIECE_CHARACTERS):
            yield piece[start : start + PIECE_CHARACTERS]
        piece = piece[whole:]
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
            raise SourceRefused(
                f"{path.name!r}, line {number}, has no text in the member {field!r}; it has {has}: "
                "name the right one, DataSource(source=..., field=...)"
            )
        if entry[field].strip():
            yield entry[field]


def _row_groups(path: Path, field: str, draw: random.Random) -> Iterator[Callable[[], Iterator[str]]]:
    """What reads each row group, one in memory at a time."""
    try:
        schema = pyarrow.parquet.read_schema(path)
        _check_column(path, schema, field)
        # a dictionary stays one: a short file could otherwise name a long text a million times
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=[field])
    except (pyarrow.ArrowException, OSError) as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"{path.name!r} is not Parquet that can be read: {error}") from None
    with file:
        order = list(range(file.num_row_groups))
        draw.shuffle(order)
        for group in order:
            _check_unpacked(path, group, _unpacked_size(file.metadata.row_group(group), field))
            yield partial(_rows, path, file, group, field)


def _check_column(path: Path, schema: pyarrow.Schema, field: str) -> None:
    if field not in schema.names:
        columns = ", ".join(schema.names[:10])
        raise SourceRefused(
            f"{path.name!r} has no column {field!r}; it has {columns}: "
            "name the right one, DataSource(source=..., field=...)"
        )
    kind = schema.field(field).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
        raise SourceRefused(f"{path.name!r} has no text in the column {field!r}, but {kind}: name another with field=")


class Unpacked:
    """The texts of a row group. A short file can name a long one a million times: it is unpacked and kept once."""

    def __init__(self, path: Path, group: int) -> None:
        self._path, self._group = path, group
        self._known: dict[str, str] = {}
        self._size = 0

    def rows(self, column: pyarrow.Array) -> Iterator[str]:
        """Those of a batch's rows that hold any."""
        if isinstance(column, pyarrow.DictionaryArray):
            words: dict[int, str | None] = {}
            for index in column.indices.to_pylist():
                if index is not None:
                    if index not in words:
                        words[index] = self._kept(column.dictionary[index].as_py())
                    if (text := words[index]) is not None:
                        yield text
        else:
            yield from filter(None, map(self._kept, column.to_pylist()))

    def _kept(self, text: str | None) -> str | None:
        if text is None or not text.strip():
            return None
        kept = self._known.setdefault(text, text)
        if kept is text:
            self._size += len(text)
            _check_unpacked(self._path, self._group, self._size)
        return kept


def _unpacked_size(group: pyarrow.parquet.RowGroupMetaData, field: str) -> int:
    columns = map(group.column, range(group.num_columns))
    return next((column.total_uncompressed_size for column in columns if column.path_in_schema == field), 0)


def _check_unpacked(path: Path, group: int, size: int) -> None:
    if size > MAX_GROUP_BYTES:
        raise SourceRefused(
            f"{path.name!r}, row group {group}, has {size:,} bytes of text when unpacked; "
            f"a worker reads at most {MAX_GROUP_BYTES:,}: write smaller row groups"
        )


def _rows(path: Path, file: pyarrow.parquet.ParquetFile, group: int, field: str) -> Iterator[str]:
    try:
        unpacked = Unpacked(path, group)
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
            yield from unpacked.rows(batch.column(0))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"{path.name!r}, row group {group}, cannot be read: {error}") from None
