"""How to reach an etcd cluster: endpoints, TLS, user. Checked before anything is opened; imports no client."""

from __future__ import annotations

import dataclasses
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from launcher.environment import Environment
from launcher.errors import UsageError
from launcher.kv.endpoint import parse_endpoint
from launcher.kv.options import StoreOptions

DEFAULT_PORT = 2379


@dataclass(frozen=True)
class Tls:
    """PEM texts and the files they came from. Without `cert` the client shows no certificate of its own."""

    cacert_path: Path | None = None
    cert_path: Path | None = None
    key_path: Path | None = None
    cacert: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def context(self) -> ssl.SSLContext:
        """Return the same trust and identity for Python's own `ssl`, to find out why a handshake fails.

        Raises:
            OSError, ssl.SSLError: a file does not hold what it must.
        """
        context = ssl.create_default_context(cafile=self.cacert_path)
        if self.cert_path is not None:
            context.load_cert_chain(self.cert_path, self.key_path)
        context.set_alpn_protocols(["h2"])
        return context


@dataclass(frozen=True)
class EtcdConfig:
    """A cluster as one client reaches it. The password is in no `repr`."""

    endpoints: tuple[tuple[str, int], ...]
    tls: Tls | None = None
    user: str = ""
    password: str = field(default="", repr=False)

    def starting_with(self, index: int) -> EtcdConfig:
        """Return the same cluster with another endpoint first: that one is used as long as it answers."""
        index %= len(self.endpoints)
        return dataclasses.replace(self, endpoints=self.endpoints[index:] + self.endpoints[:index])

    @classmethod
    def parse(cls, endpoint: str, options: StoreOptions) -> EtcdConfig:
        """Read `--rdzv-endpoint` (`host1:2379,host2:2379`, each perhaps with http:// or https://) and `--rdzv-conf`.

        Raises:
            UsageError: they contradict each other, a file cannot be read, or a password is missing.
        """
        parsed, schemes = [], set()
        for part in endpoint.split(","):
            scheme, sep, rest = part.strip().rpartition("://")
            if sep and scheme not in ("http", "https"):
                raise UsageError(f"--rdzv-endpoint {part.strip()!r}: etcd is reached by http:// or https:// only")
            schemes.add(scheme)
            parsed.append(parse_endpoint(rest.rstrip("/") if sep else rest, DEFAULT_PORT))
        return cls(
            endpoints=tuple(dict.fromkeys(parsed)),
            tls=_tls(options, schemes - {""}),
            user=options.user,
            password=_password(options) if options.user else "",
        )


def _tls(options: StoreOptions, schemes: set[str]) -> Tls | None:
    told = schemes | ({options.protocol} if options.protocol else set())
    files = {"cacert": options.cacert, "cert": options.cert, "key": options.key}
    given = {name: path for name, path in files.items() if path is not None}
    if len(told) > 1:
        raise UsageError("--rdzv-endpoint: http and https are mixed; all endpoints of a cluster speak the same")
    if told == {"http"} and given:
        named, path = next(iter(given.items()))
        raise UsageError(f"--rdzv-conf {named}={path}: has no use without TLS; set protocol=https")
    if told != {"https"} and not given:
        return None
    if ("cert" in given) != ("key" in given):
        missing = "key" if "cert" in given else "cert"
        raise UsageError(f"--rdzv-conf {missing}: a client certificate needs both cert=PATH and key=PATH")
    pem = {name: _read(name, path) for name, path in given.items()}
    authorities = pem.get("cacert") or _system_authorities()
    tls = Tls(options.cacert, options.cert, options.key, authorities, pem.get("cert"), pem.get("key"))
    try:
        tls.context()
    except (OSError, ssl.SSLError) as error:  # an SSLError is an OSError, named for the reader
        blamed = ("cert", "key") if "cert" in given else ("cacert",)
        named = ", ".join(f"{name}={files[name]}" for name in blamed)
        raise UsageError(f"--rdzv-conf {named}: not usable PEM files: {error.strerror or error}") from error
    return tls


def _system_authorities() -> bytes | None:
    """Read whom this machine trusts, or SSL_CERT_FILE says. None where it does not tell: gRPC then brings a list."""
    path = ssl.get_default_verify_paths().cafile
    return Path(path).read_bytes() if path else None


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--rdzv-conf {name}={path}: {error.strerror}") from error


def _password(options: StoreOptions) -> str:
    if options.password_file is not None:
        return _read("password_file", options.password_file).decode(errors="replace").strip()
    if password := Environment.from_env(os.environ).etcd_password:
        return password
    raise UsageError(
        f"--rdzv-conf user={options.user}: its password is missing; set {Environment.variable('etcd_password')}, "
        "or password_file=PATH"
    )
