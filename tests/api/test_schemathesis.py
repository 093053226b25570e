"""Schemathesis on the served OpenAPI document, over a real socket: a short form of `python -m torture.contract`."""

from __future__ import annotations

import re

import pytest

from tests.conftest import Server
from torture.contract import run_schemathesis


@pytest.mark.parametrize(("who", "examples"), [("administrator", 3), ("nobody", 1)])
def test_every_answer_is_one_that_the_document_describes(server: Server, who: str, examples: int) -> None:
    key = server.admin_key if who == "administrator" else None
    found = run_schemathesis(server.url, key, seed=1, examples=examples, phases="examples,fuzzing")
    assert found.returncode == 0, found.stdout
    tested = re.search(r"Tested: (\d+)", found.stdout)
    assert tested, found.stdout
    assert int(tested[1]) >= 60, found.stdout
