"""How a store is reached, beyond its endpoint: what `--rdzv-conf` says of it, typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class StoreOptions:
    """Keys of `--rdzv-conf`, which `RendezvousConf` explains; None or "" where the user gave no value."""

    is_host: bool | None = None
    token_file: Path | None = None
    protocol: Literal["http", "https"] | None = None
    cacert: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    prefix: str = ""
