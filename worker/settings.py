"""What an operator sets for a worker, read once from the environment (prefix BLUEPRINTS_) by `python -m worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gradient_blueprints.addresses import Network, read_network
from gradient_blueprints.cache import default_folder
from gradient_blueprints.log_lines import LogFormat

GIBIBYTE = 1 << 30


Commas = Annotated[tuple[str, ...], NoDecode]


class WorkerSettings(BaseSettings):
    """A worker knows the registry by its URL and a key of scope `work`, and the broker; never the database."""

    model_config = SettingsConfigDict(env_prefix="BLUEPRINTS_", frozen=True, extra="ignore")

    url: str = Field(description="the registry")
    api_key: SecretStr = Field(description="a key of scope work")
    broker_url: str = Field(description="Redis or Valkey URL that jobs are announced through")
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders that checkpoints and texts are read from, separated as in PATH"
    )
    allowed_buckets: Commas = Field((), description="buckets, or `bucket/prefix`, that s3:// sources may name")
    allowed_hub: Commas = Field((), description="repositories that hf:// sources may name: `org/name`, `org/*`, `*`")
    source_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="private networks that hf:// and s3:// sources may lead to, such as `10.0.0.0/8`, separated by "
        "commas; the registry, HF_ENDPOINT, the S3 endpoint and proxies may be private anyway",
    )
    hub_token: SecretStr | None = Field(None, description="token of the Hugging Face hub, for gated repositories")
    cache: Path | None = Field(
        None, description="folder of fetched checkpoints; `gradient-blueprints/worker` in the user's cache if unset"
    )
    cache_bytes: int = Field(
        100 * GIBIBYTE,
        gt=0,
        description="size at which the longest unused of them go, of those from the registry and of those from the hub "
        "each; what was used within the hour stays",
    )
    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:1, mps; auto takes the first accelerator there is, "
        "and a worker does not start without the one that is named",
    )
    max_model_bytes: int = Field(
        64 * GIBIBYTE, gt=0, description="largest weights: of all their files, and as the model takes them in memory"
    )
    max_text_bytes: int = Field(GIBIBYTE // 4, gt=0, description="largest text file of a domain")
    max_memory_bytes: int | None = Field(
        None,
        gt=0,
        description="resident memory at which the profiling process is ended; without it, the system's limit",
    )

    heartbeat: Path | None = Field(
        None, description="file that is touched every few seconds while the worker hears the broker, for health checks"
    )

    worker_metrics: str | None = Field(
        None, pattern=r"^\S+:\d+$", description="`host:port` at which the worker answers Prometheus"
    )
    log_format: LogFormat = Field(LogFormat.TEXT, description="lines of the log as `text` or `json`")

    @field_validator("allowed_buckets", "allowed_hub", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("source_networks", mode="before")
    @classmethod
    def _read_networks(cls, value: object) -> object:
        return tuple(map(read_network, filter(None, value.split(",")))) if isinstance(value, str) else value

    @property
    def cache_folder(self) -> Path:
        return self.cache or default_folder(os.environ) / "worker"

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(os.pathsep) if part) if isinstance(value, str) else value
