"""A copy that is killed right before a chosen write to the target; run as a program of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from elastic_moe.cli.main import main
from storage.stores.local import LocalStore
from storage.stores.s3.bucket import Bucket

WRITES: list[tuple[type, str]] = [
    (LocalStore, "_put"),  # by which it puts, in parts or not
    (Bucket, "put_object"),
    (Bucket, "put_part"),
    (Bucket, "complete_upload"),
]


def die_before(number: int) -> None:
    """SIGKILL this process before its write number `number`, from 0; it says before which key."""
    lock = threading.Lock()
    count = 0

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if ".probe-" in key:
                return method(self, key, *args, **kwargs)
            with lock:
                if count == number:
                    print(f"killed before {name.lstrip('_')} {key}", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return method(self, key, *args, **kwargs)

        return call

    for kind, name in WRITES:
        setattr(kind, name, counted(name, getattr(kind, name)))


if __name__ == "__main__":
    die_before(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
