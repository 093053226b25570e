"""What the pages say is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.api.application import create_app
from app.settings import Settings
from gradient_blueprints.models import RESERVED_SEGMENTS, ProfileOptions
from tests import settings_reference

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_settings_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_reference.render()


def test_every_setting_says_what_it_is_for() -> None:
    assert "| None |" not in settings_reference.render()


def test_every_endpoint_is_documented(settings: Settings) -> None:
    page = (ROOT / "docs" / "http-api.md").read_text()
    last_parts = {
        path.rstrip("/").rsplit("/", 1)[-1]
        for path in create_app(settings).openapi()["paths"]
        if not path.endswith("}")
    }
    assert {part for part in last_parts if part not in page} == set()


def test_the_options_of_a_job_stand_on_its_page_with_their_defaults() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text()
    for name, field in ProfileOptions.model_fields.items():
        default = f"`{field.default}`" if isinstance(field.default, str) else f"{field.default}"
        assert f"| `{name}` | {default} |" in page


def test_the_reserved_names_of_models_stand_on_the_page_of_the_format() -> None:
    page = (ROOT / "docs" / "blueprint-format.md").read_text()
    assert ", ".join(f"`{name}`" for name in RESERVED_SEGMENTS) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
