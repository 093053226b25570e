"""What an operator sets for a worker, read once from the environment (prefix BLUEPRINTS_) by `python -m worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

GIBIBYTE = 1 << 30


class WorkerSettings(BaseSettings):
    """A worker knows the registry by its URL and a key of scope `work`, and the broker; never the database."""

    model_config = SettingsConfigDict(env_prefix="BLUEPRINTS_", frozen=True, extra="ignore")

    url: str = Field(description="the registry")
    api_key: SecretStr = Field(description="a key of scope work")
    broker_url: str = Field(description="Redis or Valkey URL that jobs are announced through")
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders that checkpoints and texts are read from, separated as in PATH"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes the first accelerator there is")
    max_model_bytes: int = Field(64 * GIBIBYTE, gt=0, description="largest weights, as they stand in memory")
    max_text_bytes: int = Field(GIBIBYTE // 4, gt=0, description="largest text file of a domain")
    max_memory_bytes: int | None = Field(
        None,
        gt=0,
        description="resident memory at which the profiling process is ended; without it, the system's limit",
    )

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(os.pathsep) if part) if isinstance(value, str) else value
