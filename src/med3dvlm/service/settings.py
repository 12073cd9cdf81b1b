"""What can be set about the service: defaults, then a YAML file, the environment, the command line.

    MED3DVLM_DATABASE=postgresql://med3dvlm@db/med3dvlm med3dvlm serve --config service.yaml

An environment variable is a field's name in capitals behind `MED3DVLM_`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

PREFIX = "MED3DVLM_"


class SettingsError(ValueError):
    """Settings that cannot be used: which, and what they may be."""


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pairs(value: Any) -> Any:
    if isinstance(value, str):
        return dict(map(str.strip, part.rpartition("=")[::2]) for part in _names(value))
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""A list; in the environment with commas between."""

Pairs = Annotated[dict[str, str], BeforeValidator(_pairs)]
"""A mapping; in the environment as name=value with commas between."""


FILES = ("tls_certificate", "tls_key", "pacs_ca", "pacs_certificate", "pacs_key", "oidc_ca")
PAIRS = (("tls_certificate", "tls_key"), ("pacs_certificate", "pacs_key"))


class Settings(BaseModel):
    """Everything that can be set; all paths and URLs that are not given lie under `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # where things are
    data: Path = Field(Path("med3dvlm-data"), description="Folder of whatever has no other place.")
    database: str = Field("", description="SQLAlchemy URL: sqlite:///file or postgresql://…")
    storage: str = Field("", description="Folder, or an fsspec URL such as s3://bucket/prefix.")
    index: str = Field("", description="Search index: a folder, or postgresql://…#name.")

    # the model
    model: str = Field("demo", description="'demo', a checkpoint folder, or a hub name.")
    search_model: str = Field(
        "", description="That of the search, where the model has no such part."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    precision: str | None = Field(None, description="fp32 or bf16, of the encoder.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="Withhold what is less sure; needs a calibrated model."
    )

    # the server
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    # the work
    workers: int | None = Field(
        None,
        ge=0,
        description="Worker processes; 0: elsewhere; none: a thread of the server.",
    )
    batch: int = Field(8, ge=1, description="Jobs that a worker answers together.")
    queue_limit: int = Field(200, ge=1, description="Jobs waiting; beyond: 503.")
    user_limit: int = Field(20, ge=1, description="Jobs of one user waiting; beyond: 429.")
    lease_s: float = Field(30, gt=0, description="A worker silent for so long has died.")
    attempts: int = Field(3, ge=1, description="Times that a job is tried.")
    streams: int = Field(200, ge=1, description="Event streams open at a time; beyond: 503.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Of `med3dvlm work`; 0: none.")
    events_kept_h: float = Field(24, gt=0, description="Hours that a job's events are kept.")

    # what comes in
    upload_mb: int = Field(2048, ge=1, description="Largest upload, MB.")
    upload_files: int = Field(5000, ge=1, description="Most files of an upload.")

    # access
    public_url: str = Field("", description="https://… by which browsers reach it; for OIDC.")
    allowed_hosts: Names = Field((), description="Host names that it answers to; none: any.")
    trusted_proxies: Names = Field((), description="Addresses whose X-Forwarded-… is believed.")
    password_length: int = Field(12, ge=8, description="Fewest characters of a password.")
    session_idle_min: float = Field(30, gt=0, description="Minutes idle until signed out.")
    session_h: float = Field(12, gt=0, description="Hours until one must sign in again.")
    sign_ins_per_min: int = Field(10, ge=1, description="From one address.")
    requests_per_min: int = Field(1200, ge=1, description="Of one user or key.")
    guest_requests_per_min: int = Field(600, ge=1, description="From one address, not signed in.")
    body_kb: int = Field(1024, ge=1, description="Largest request that is no upload.")
    oidc_issuer: str = Field("", description="URL of the OpenID provider; empty: none.")
    oidc_client: str = Field("", description="This service's client id there.")
    oidc_secret: SecretStr = Field(SecretStr(""), description="And its secret, if it has one.")
    oidc_scope: str = Field("openid profile", description="What is asked of the provider.")
    oidc_name_claim: str = Field("preferred_username", description="Claim that names the user.")
    oidc_role_claim: str = Field("groups", description="Claim that says what the user is.")
    oidc_roles: Pairs = Field({}, description="value=role, …: that claim's values to roles.")
    oidc_ca: Path | None = Field(None, description="Certificates that the provider's is signed by.")

    # hospital
    pacs_url: str = Field("", description="DICOMweb service of the PACS; empty: none.")
    pacs_user: str = Field("", description="With pacs_password, for Basic authentication.")
    pacs_password: SecretStr = SecretStr("")
    pacs_token: SecretStr = Field(SecretStr(""), description="Bearer token, in place of a user.")
    pacs_ca: Path | None = Field(None, description="PEM file of who signed its certificate.")
    pacs_certificate: Path | None = Field(None, description="Client certificate, PEM.")
    pacs_key: Path | None = Field(None, description="Its key, PEM.")
    pacs_timeout_s: float = Field(60, gt=0, description="That the PACS may be silent.")
    pacs_limit_mb: int = Field(8192, ge=1, description="Largest study that is fetched, MB.")
    organization: str = Field("", description="Of the signers; else that of the images.")
    language: str = Field("en", pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")
    pdf_fonts: Names = Field(
        (), description="Fonts for letters that DejaVu Sans lacks, such as Chinese."
    )

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data / 'med3dvlm.db'}"

    @property
    def storage_url(self) -> str:
        return self.storage or str(self.data / "files")

    @property
    def index_url(self) -> str:
        return self.index or str(self.data / "studies.index")


def load_settings(
    file: Path | str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    **given: Any,
) -> Settings:
    """Settings from a YAML file, the environment and arguments; the later win, None is not given.

    Raises:
        SettingsError: for an unknown name or an impossible value.
    """
    values = _read_file(file) if file is not None else {}
    environment = os.environ if environment is None else environment
    for name in Settings.model_fields:
        value = environment.get(PREFIX + name.upper(), "")
        if value != "":
            values[name] = value
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise SettingsError(
            f"setting {name!r} cannot be {first.get('input')!r}: {first['msg']}."
        ) from error
    _check_files(settings)
    return settings


def _check_files(settings: Settings) -> None:
    if settings.data.exists() and not settings.data.is_dir():
        raise SettingsError(f"setting 'data': {settings.data} is a file; give a folder.")
    for name in FILES:
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"setting {name!r}: there is no file {path}; check the path.")
    for certificate, key in PAIRS:
        if getattr(settings, key) and not getattr(settings, certificate):
            raise SettingsError(f"setting {key!r} is of no use alone: give {certificate!r}, too.")


def _read_file(file: Path | str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # the YAML parser's errors have no common kind
        reason = " ".join(str(error).split())[:160]
        raise SettingsError(f"{file}: it cannot be read as YAML ({reason}).") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: it must hold 'name: value' lines.")
    return {str(name): value for name, value in values.items()}
