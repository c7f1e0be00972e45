"""How a store is reached, beyond its endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class StoreOptions(BaseModel):
    """The keys of `--rdzv-conf` that concern the store, each with its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    token_file: Path | None = None
    """File with the secret that the embedded store wants from its clients."""
    is_host: bool | None = None
    """Whether this node hosts the embedded store, where the endpoint's name does not tell."""
    protocol: Literal["http", "https"] | None = None
    """etcd3: https for TLS; implied by certificates, and by https:// before an endpoint."""
    cacert: Path | None = None
    """etcd3: file with the certificates (PEM) of the authorities that etcd's certificate may come from."""
    cert: Path | None = None
    """etcd3: file with this client's certificate."""
    key: Path | None = None
    """etcd3: file with the private key of `cert`."""
    user: str = ""
    """etcd3: user name; the password comes from `password_file` or the environment (`Environment.etcd_password`)."""
    password_file: Path | None = None
    """etcd3: file with the password of `user`."""
    prefix: str = ""
    """etcd3: goes before every key, for a user who may not write others. Keys are `PREFIXelastic-moe/RUN_ID/...`."""
