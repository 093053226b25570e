"""Packing text into sequences: whole batches, nothing twice, the same for the same seed, and clear refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from worker.sources import SourceRefused
from worker.texts import PIECE_CHARACTERS, PackedText, pack

END = -1


def packed(path: Path, **changes: Any) -> PackedText:
    """One token a character, so that what stands where can be read."""
    arguments: dict[str, Any] = {
        "field": "text",
        "encode": lambda text: [ord(character) for character in text],
        "separator": END,
        "sequence_length": 5,
        "batch_size": 2,
        "batches": 3,
        "seed": 0,
    }
    return pack(path, **(arguments | changes))


def write(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_sequences_are_the_stream_of_documents_cut_at_equal_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "abcdefg"}, {"text": "hij"}, {"text": "klmnopqrst"})
    found = packed(path, batches=100)
    stream = [token for sequence in found.sequences for token in sequence]
    assert {len(sequence) for sequence in found.sequences} == {5}
    assert len(found.sequences) == 4
    letters = [chr(token) for token in stream if token != END]
    assert len(set(letters)) == len(letters), "a token is there twice"
    assert stream.count(END) >= 2
    assert found.documents == 3


def test_only_whole_batches_are_made_and_no_more_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("x" * 47)  # 48 tokens: 9 sequences of 5, 4 batches of 2
    assert len(packed(path, batches=100).sequences) == 8
    assert len(packed(path, batches=3).sequences) == 6


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_documents_of_a_batch_that_is_not_whole_are_not_counted(packing: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"text": "abcdefghij"} for _ in range(15)))
    found = packed(path, packing=packing, sequence_length=11, batch_size=8)
    assert (len(found.sequences), found.documents) == (8, 8)


def test_the_seed_draws_the_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"text": chr(97 + n) * 4} for n in range(20)))
    first = packed(path, seed=1, batches=1)
    assert packed(path, seed=1, batches=1) == first
    assert packed(path, seed=2, batches=1).sequences != first.sequences
    assert first.documents == 2


def test_a_plain_file_is_drawn_from_all_over_and_loses_nothing(tmp_path: Path) -> None:
    lines = [f"{n:04d}\n" for n in range(20_000)]
    path = tmp_path / "d.txt"
    path.write_text("".join(lines))
    whole = packed(path, batches=10**6, sequence_length=1, batch_size=1)
    text = "".join(chr(sequence[0]) for sequence in whole.sequences if sequence[0] != END)
    assert sorted(text.split()) == sorted(line.strip() for line in lines)
    few = packed(path, batches=10, batch_size=1)
    assert chr(few.sequences[0][0]) != "0" or few.sequences[0][:4] != [ord("0")] * 4


def test_a_line_longer_than_a_piece_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("y" * (3 * PIECE_CHARACTERS + 7))
    found = packed(path, batches=10**6, sequence_length=1, batch_size=1)
    assert sum(sequence == [ord("y")] for sequence in found.sequences) == 3 * PIECE_CHARACTERS + 7


def test_one_long_line_is_split_in_a_time_that_grows_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"y" * (16 << 20))
    start = time.process_time()
    packed(path, encode=lambda text: [len(text)], batches=10**6)
    assert time.process_time() - start < 2, "as often as there are pieces, the rest of the line was copied"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.txt", b"", "gives 0 tokens"),
        ("d.txt", b"\n \n", "gives 0 tokens"),
        ("d.txt", b"short", "needs 10: give more text"),
        ("d.txt", b"good line\n\xff\xfe bad\n", "not UTF-8: line 2, byte 0"),
        ("d.bin", b"text", "ends in .bin"),
        ("d", b"text", "ends in nothing"),
        ("d.jsonl", b'{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("d.jsonl", b'{"body": "a", "id": 1}\n', "no text in the member 'text'; it has body, id"),
        ("d.jsonl", b'{"text": 5}\n', "no text in the member 'text'"),
        ("d.jsonl", b'["a"]\n', "it has list"),
        ("d.jsonl", b"[" * 100_000, "is not JSON"),
        ("d.jsonl", b"\n\n", "gives 0 tokens"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_with_its_place(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceRefused, match=reason):
        packed(path)


# --- Parquet


def parquet(path: Path, **columns: Any) -> Path:
    """Forty documents of a letter of their own, four times, in row groups of ten."""
    table = columns or {"text": [chr(0x4E00 + n) * 4 for n in range(40)], "n": list(range(40))}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=10)
    return path


def test_parquet_is_read_by_row_groups_in_an_order_that_the_seed_draws(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet")
    whole = packed(path, batches=100)
    letters = {token for sequence in whole.sequences for token in sequence if token != END}
    assert (whole.documents, len(letters)) == (40, 40)
    first = packed(path, batches=1, seed=1)
    assert packed(path, batches=1, seed=1) == first
    assert packed(path, batches=1, seed=2).sequences != first.sequences
    few = {token for sequence in packed(path, batches=5).sequences for token in sequence if token != END}
    assert len({(token - 0x4E00) // 10 for token in few}) == 1, "ten documents need one row group and no other"


def test_a_dictionary_of_texts_and_rows_without_any_are_read(tmp_path: Path) -> None:
    words = pyarrow.array(["abcd", None, "  ", "efgh"] * 3).dictionary_encode()
    path = parquet(tmp_path / "d.parquet", body=words)
    assert packed(path, field="body", batches=100).documents == 6


def test_views_of_texts_are_read(tmp_path: Path) -> None:
    views = pyarrow.array(["abcd", None, "a text that is not kept within its view"] * 3, pyarrow.string_view())
    found = packed(parquet(tmp_path / "d.parquet", text=views), batches=100, sequence_length=1, batch_size=1)
    assert found.documents == 6


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"body": ["a"], "id": [1]}, r"has no column 'text'; it has body, id: name the right one, DataSource"),
        ({"text": [1, 2]}, "no text in the column 'text', but int64"),
        ({"text": [["a"], ["b"]]}, "no text in the column 'text', but list"),
        ({"text": [None, ""]}, "no text in the column 'text', but|gives 0 tokens"),
    ],
)
def test_parquet_without_the_text_is_refused(columns: dict[str, list[Any]], reason: str, tmp_path: Path) -> None:
    with pytest.raises(SourceRefused, match=reason):
        packed(parquet(tmp_path / "d.parquet", **columns))


@pytest.mark.parametrize("damage", [lambda content: b"PAR1", lambda content: content[:-9] + b"x" * 9, bytes.upper])
def test_damaged_parquet_is_refused(damage: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceRefused, match=r"is not Parquet|cannot be read|no column"):
        packed(path, batches=100)


def test_a_format_that_is_named_wins_over_the_suffix(tmp_path: Path) -> None:
    path = parquet(tmp_path / "shard-00001")
    assert packed(path, text_format="parquet").documents > 0
    with pytest.raises(SourceRefused, match="not UTF-8"):
        packed(path, text_format="text")


# --- padded, and limited by tokens


def test_padded_each_document_is_one_sequence_cut_at_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"text": text} for text in ("ab", "cdefghij", "k", "lmn", "opq")))
    found = packed(path, packing="padded")
    assert sorted(map(len, found.sequences)) == [2, 3, 3, 5], "a document of one token predicts nothing"
    assert (found.documents, found.tokens) == (4, 13)
    with pytest.raises(SourceRefused, match="needs 3 documents of at least 2 tokens"):
        packed(write(tmp_path / "few.jsonl", {"text": "ab"}, {"text": "cd"}), packing="padded", batch_size=3)


def test_no_more_tokens_are_taken_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("x" * 400)
    assert packed(path, batches=100, max_tokens=39).tokens == 30  # whole batches of 10
    lines = write(tmp_path / "d.jsonl", *({"text": "abcd"} for _ in range(50)))
    assert packed(lines, batches=100, packing="padded", max_tokens=39).tokens == 32
    with pytest.raises(SourceRefused, match="max_tokens lets through 9"):
        packed(path, max_tokens=9)
