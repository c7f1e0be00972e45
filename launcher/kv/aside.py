"""Telling what nobody follows, as how a node's workers are: beside the keys, where a store has a cheaper way for it.

On a bucket every write of a key is a version that all nodes read; what is told aside goes with a lease's renewals.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from launcher.kv.base import KV
from launcher.kv.lease import Lease


@runtime_checkable
class TellsAside(Protocol):
    """What such a store can do besides. Both may be called from any thread, and raise KVUnavailable."""

    def tell(self, key: str, value: bytes, lease: Lease) -> None:
        """Have `told` show `value` under `key` from the lease's next renewal on, for as long as the lease stands."""
        ...

    def told(self, prefix: str) -> dict[str, bytes]:
        """Return what holders of leases tell under keys that begin with `prefix`."""
        ...


def tell(kv: KV, key: str, value: bytes, lease: Lease) -> None:
    """Tell `value` under `key` for as long as the lease stands; it may take until its next renewal to be seen."""
    if isinstance(kv, TellsAside):
        kv.tell(key, value, lease)
    else:
        kv.put(key, value, lease=lease)


def told(kv: KV, prefix: str) -> dict[str, bytes]:
    """Return what was told under keys that begin with `prefix`."""
    if isinstance(kv, TellsAside):
        return kv.told(prefix)
    return {entry.key: entry.value for entry in kv.list(prefix).entries}
