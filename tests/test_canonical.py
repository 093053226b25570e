"""Our canonical form against another implementation of RFC 8785."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from gradient_blueprints.canonical import MAX_SAFE_INTEGER, canonical_bytes

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.builds(
    lambda digits, power: float(f"{digits}e{power}"), st.integers(-9999, 9999), st.integers(-12, 25)
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(PLAIN)
def test_any_json_has_the_form_that_another_implementation_gives_it(value: Any) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)


@given(NUMBERS)
def test_any_number_is_written_as_another_implementation_writes_it(value: float) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)


def test_names_are_ordered_by_their_utf16_code_units() -> None:
    # From RFC 8785, section 3.2.3: by code points the emoji would come last.
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    assert canonical_bytes(dict.fromkeys(names, 0)).decode() == (
        '{"\\r":0,"1":0,"\u0080":0,"\u00f6":0,"\u20ac":0,"\U0001f600":0,"\ufb33":0}'
    )


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), "\ud800", {1, 2}, b"bytes", 10**400, {1: 2}, {None: 1}, {"a": 1, 2: 3}]
)
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_bytes([value])


def test_nesting_beyond_the_stack_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(20_000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deep"):
        canonical_bytes(nested)


def test_numbers_and_texts_of_other_types_are_written_as_what_they_are() -> None:
    class Count(IntEnum):
        ONE = 1

    class Tag(StrEnum):
        CODE = "code"

    assert canonical_bytes([Count.ONE, Tag.CODE, np.float64(0.5), {Tag.CODE: True}]) == b'[1,"code",0.5,{"code":true}]'
