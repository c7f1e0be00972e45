"""A folder that is asked as an object store is: each request takes so much longer, at no CPU time."""

from __future__ import annotations

import time

from elastic_moe.register import StoreRegister
from launcher.kv.bucket.client import REMOTE_PACE, BucketKV
from storage import open_store

SCHEME = "far:"


class FarRegister(StoreRegister):
    """Of `far:SECONDS:FOLDER`. Files in FOLDER.requests grow by a byte with each request."""

    def __init__(self, endpoint: str) -> None:
        _, seconds, folder = endpoint.split(":", 2)
        super().__init__(open_store(folder))
        self._latency_s = float(seconds)
        self._counter = open(f"{folder}.requests", "ab", buffering=0)  # noqa: SIM115 (as long as the register)

    @property
    def is_remote(self) -> bool:
        return True

    @property
    def name_size_bytes_max(self) -> int:
        return 800

    def _wait(self) -> None:
        self._counter.write(b"x")
        time.sleep(self._latency_s)

    def read(self, name: str) -> bytes | None:
        self._wait()
        return super().read(name)

    def create(self, name: str, content: bytes) -> bool:
        self._wait()
        return super().create(name, content)

    def write(self, name: str, content: bytes) -> None:
        self._wait()
        super().write(name, content)

    def names(self, prefix: str) -> list[str]:
        self._wait()
        return super().names(prefix)

    def remove(self, name: str) -> None:
        self._wait()
        super().remove(name)


def far_kv(endpoint: str) -> BucketKV:
    """A client of such a place."""
    return BucketKV(FarRegister(endpoint), REMOTE_PACE)
