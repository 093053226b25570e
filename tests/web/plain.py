"""Pages over plain HTTP, sent as a browser sends them: cookies are kept, a form goes back with its hidden fields."""

from __future__ import annotations

import html
import re

import httpx2

_HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


class PlainBrowser(httpx2.Client):
    def __init__(self, url: str) -> None:
        super().__init__(base_url=url, timeout=60, headers={"Accept": "text/html", "Origin": url})

    def submit(self, page: str, action: str, **fields: str | list[str]) -> httpx2.Response:
        """The form of `page` that goes to `action`, with these fields."""
        shown = self.get(page).raise_for_status().text
        (form,) = re.findall(rf'<form[^>]* action="{re.escape(action)}".*?</form>', shown, re.DOTALL)
        return self.post(action, data=hidden_fields(form) | fields)

    def log_in(self, key: str) -> httpx2.Response:
        return self.submit("/login", "/login", key=key)


def hidden_fields(form: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _HIDDEN.findall(form)}
