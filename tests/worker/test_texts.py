"""Packing text into sequences: whole batches, nothing twice, the same for the same seed, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
