"""Everything an operator can set, read once from the environment (prefix BLUEPRINTS_) by the entry points."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url

from gradient_blueprints.addresses import Network, read_network
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.log_lines import LogFormat, hide_secrets, passwords_in

MEBIBYTE = 1 << 20


class Settings(BaseSettings):
    """Built in one place and passed on; nothing else reads the environment."""

    model_config = SettingsConfigDict(env_prefix="BLUEPRINTS_", frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: str = Field(repr=False, description="PostgreSQL URL, `postgresql://user:password@host/name`")
    database_password: SecretStr | None = Field(None, description="password, when the URL holds none")
    broker_url: str | None = Field(
        None, repr=False, description="Redis or Valkey URL that announces jobs; the relay needs it"
    )
    secret: SecretStr = Field(
        min_length=32, description="keys the hash of API keys; at least 32 characters, the same on every process"
    )
    admin_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="bootstrap key with the scope admin, at least 32 characters; another one replaces it",
    )
    worker_key: SecretStr | None = Field(
        None, min_length=32, description="bootstrap key with the scope work, for workers; at least 32 characters"
    )
    operator_lab: str = Field("operator", description="lab of the bootstrap keys")
    store: Path = Field(Path("store"), description="folder of attachments and uploaded files")
    checkpoint_store: str | None = Field(
        None, description="folder of uploaded checkpoints, or `s3://bucket/prefix`; `checkpoints` in the store if unset"
    )

    public_reads: bool = Field(True, description="whether reading needs no key")
    max_document_bytes: int = Field(16 * MEBIBYTE, gt=0, description="largest blueprint body")
    max_blob_bytes: int = Field(8 << 30, gt=0, description="largest attachment")
    max_shard_bytes: int = Field(256 << 30, gt=0, description="largest partial result of a job's shard")
    max_file_bytes: int = Field(64 << 30, gt=0, description="largest file of an uploaded checkpoint")
    lab_file_bytes: int = Field(1 << 40, gt=0, description="uploaded checkpoint files of one lab together")
    upload_seconds: float = Field(
        7 * 86_400, gt=0, description="time after which an unfinished upload that nobody goes on with is removed"
    )
    max_body_bytes: int = Field(MEBIBYTE, gt=0, description="largest body of every other request")
    body_seconds: float = Field(
        60, gt=0, description="time in which a request body must arrive; of files, and of streamed answers, each piece"
    )
    request_seconds: float = Field(
        60, gt=0, description="time in which the answer to a complete request must begin, except where files are sent"
    )
    key_requests_per_minute: int = Field(
        60_000, ge=0, description="requests a minute of one key, counted by each process for itself; 0: no limit"
    )
    address_requests_per_minute: int = Field(
        6_000, ge=0, description="requests a minute of one address without a valid key, likewise; 0: no limit"
    )
    trusted_proxies: str = Field(
        "",
        description="addresses or networks of proxies, separated by commas, whose `X-Forwarded-For` and "
        "`X-Forwarded-Proto` are believed",
    )
    document_cache_bytes: int = Field(256 * MEBIBYTE, ge=0, description="memory for blueprint bodies, per process")

    aggregations: int = Field(
        4, gt=0, description="aggregations under way at a time, per process, each with a database connection of its own"
    )
    aggregation_seconds: float = Field(
        900, gt=0, description="time in which a client must have taken the whole of an aggregation"
    )

    pool_size: int = Field(
        10, gt=0, description="database connections kept, per process; an API has 5 more and those of aggregations"
    )
    pool_overflow: int = Field(10, ge=0, description="further connections under load, per process")
    statement_seconds: float = Field(
        30, gt=0, description="time limit of one SQL statement, and of a transaction's rest before the next"
    )

    session_seconds: float = Field(
        12 * 3_600, ge=1, description="time after which a browser must log in to the pages again"
    )

    lease_seconds: float = Field(60, gt=0, description="time after which a silent worker loses its job")
    max_attempts: int = Field(3, gt=0, description="workers a job may lose before it is crashed")
    reannounce_seconds: float = Field(60, gt=0, description="time after which a queued job is announced again")
    sweep_seconds: float = Field(5, gt=0, description="pause between two looks for lost leases")

    webhook_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="networks that webhooks may lie in although they are private, such as `10.0.0.0/8`, separated by "
        "commas; with any, unencrypted http is accepted too",
    )
    webhook_retry_seconds: Annotated[tuple[Annotated[float, Field(gt=0)], ...], NoDecode] = Field(
        (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400),
        min_length=1,
        description="pauses after each failed attempt to deliver a message, separated by commas",
    )

    @field_validator("webhook_networks", mode="before")
    @classmethod
    def _read_networks(cls, value: object) -> object:
        return tuple(map(read_network, filter(None, value.split(",")))) if isinstance(value, str) else value

    @field_validator("webhook_retry_seconds", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    heartbeat: Path | None = Field(
        None, description="file that the relay touches every few seconds while all its parts go on, for health checks"
    )
    relay_metrics: str | None = Field(
        None,
        pattern=r"^\S+:\d+$",
        description="`host:port` at which the relay answers Prometheus; the API does so at `/metrics`",
    )
    log_format: LogFormat = Field(LogFormat.TEXT, description="lines of the log as `text` or `json`")
    log_requests: bool = Field(True, description="whether every request is logged, or failed ones alone")

    @property
    def checkpoint_location(self) -> str:
        return self.checkpoint_store or str(self.store / "checkpoints")


def read_settings() -> Settings:
    """Settings from the environment, and secrets from files named `blueprints_...` in BLUEPRINTS_SECRETS_DIR."""
    try:
        settings = Settings(_secrets_dir=os.environ.get("BLUEPRINTS_SECRETS_DIR"))
    except ValidationError as invalid:
        faults = [
            f"BLUEPRINTS_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in invalid.errors()
        ]
        raise ConfigurationError("\n".join(faults)) from None  # never with the values, secrets among them
    url = make_url(settings.database_url)
    if settings.database_password is not None and url.password is None:
        url = url.set(password=settings.database_password.get_secret_value())
        settings = settings.model_copy(update={"database_url": url.render_as_string(hide_password=False)})
    secrets = (settings.database_password, settings.secret, settings.admin_key, settings.worker_key)
    hide_secrets(secret.get_secret_value() for secret in secrets if secret is not None)
    hide_secrets(passwords_in(settings.database_url, settings.broker_url))
    return settings
