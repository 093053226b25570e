"""What every page has: a policy, an error page, a way past the navigation, room on a phone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Server
from tests.web.conftest import Visitor


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_first_page_is_accessible_and_quiet(
    server: Server, open_visitor: Callable[..., Visitor], dark: bool
) -> None:
    visitor = open_visitor(server.url, dark=dark)
    visitor.visit("/")
    visitor.check()
