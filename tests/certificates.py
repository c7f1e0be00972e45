"""Certificates for tests: an authority of our own and what it signs, all valid for an hour."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates for 127.0.0.1, localhost and further addresses."""

    def __init__(self, folder: Path, name: str, addresses: Sequence[str] = ()) -> None:
        self._folder = folder
        self._addresses = ("127.0.0.1", *addresses)
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(f"authority-{name}", self._key, is_authority=True)
        self._write("ca.pem", self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> dict[str, str]:
        """Paths by the names of `--rdzv-conf`: cacert, cert, key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, is_authority=False)
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return {
            "cacert": str(self._folder / f"{self._name}-ca.pem"),
            "cert": self._write(f"{name}.pem", certificate.public_bytes(pem)),
            "key": self._write(f"{name}-key.pem", private),
        }

    def _write(self, name: str, text: bytes) -> str:
        path = self._folder / f"{self._name}-{name}"
        path.write_bytes(text)
        return str(path)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority-{self._name}")])
        numbers = [x509.IPAddress(ipaddress.ip_address(address)) for address in self._addresses]
        hosts = [x509.DNSName("localhost"), *numbers]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())
