"""Writes docs/settings.md from the settings themselves: `python -m tests.settings_reference > docs/settings.md`."""

from __future__ import annotations

from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from app.settings import Settings
from worker.settings import WorkerSettings

HEAD = """# Settings

Every setting is an environment variable. Secrets may instead be files in the folder that `BLUEPRINTS_SECRETS_DIR`
names, each called like its variable in lower case (`python -m app up` reads the environment alone). Written by
`python -m tests.settings_reference`.
"""


def render() -> str:
    parts = [HEAD]
    for title, settings in (("The API and the relay", Settings), ("The worker", WorkerSettings)):
        parts.append(f"\n## {title}\n\n| Variable | Default | Meaning |\n|---|---|---|\n{_rows(settings)}")
    return "".join(parts)


def _rows(settings: type[BaseSettings]) -> str:
    prefix = settings.model_config["env_prefix"]
    rows = []
    for name, field in sorted(settings.model_fields.items()):
        default = "required" if field.default is PydanticUndefined else _shown(field.default)
        rows.append(f"| `{prefix}{name.upper()}` | {default} | {field.description} |\n")
    return "".join(rows)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    return "" if default is None else f"`{default}`"


if __name__ == "__main__":
    print(render(), end="")
