"""The entry point that torch loads to find our rendezvous handler.

torch loads every plug-in whenever its rendezvous package is imported, in each worker too, and while its own modules
are half imported. So nothing of torch or ours may be imported here before a handler is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters


def bucket() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """As `etcd3`, of the store on objects or in a folder: the back end's name is among the parameters."""
    return _create


def etcd3() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the function that makes a handler; the entry point in group `torchrun.handlers` names this factory."""
    return _create


def _create(params: RendezvousParameters) -> RendezvousHandler:
    from launcher.elastic.handlers import create_handler

    return create_handler(params)
