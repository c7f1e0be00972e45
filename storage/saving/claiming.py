"""A claim that is made on a thread while the job reads from memory: a commit needs it, a restore does not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from typing import Self

from storage.run.attempt import Attempt

log = logging.getLogger(__name__)

_CLOSE_S = 15.0
_RESTORE_S = 1.0
"""For so long the claim keeps away from the processor of the rank that reads, unless somebody waits for it."""
Claims = Callable[[Callable[[], None], Callable[[], None]], bool]
"""Whether the claim is recorded in the end. It gets a function to call when no other job is found to have the run, and
one that returns when it is to go on."""


class ClaimBehind:
    """The claim, and how far it has come. `may_adopt`: attempts that it may come to adopt, and no others."""

    def __init__(self, may_adopt: Collection[Attempt]) -> None:
        self.may_adopt = may_adopt
        self._looked: Future[None] = Future()
        self._claimed: Future[bool] = Future()
        self._is_wanted = threading.Event()

    def start(self, claim: Claims) -> Self:
        """Begin. It ends by itself, and `close` waits for that."""
        threading.Thread(target=self._run, args=(claim,), name="storage-claim", daemon=True).start()
        return self

    def await_look(self) -> None:
        """Wait until no other job is found to have the run, or the claim has ended. Raises what it has failed with."""
        self._looked.result()

    def settle(self) -> bool:
        """What the claim comes to, or raises."""
        self._is_wanted.set()
        return self._claimed.result()

    def close(self) -> None:
        """Wait for its end, though not for ever, whatever that is."""
        self._is_wanted.set()
        if not wait([self._claimed], _CLOSE_S).done:
            log.warning("the store does not answer, so another job may have to wait for it")

    def _keep_away(self) -> None:
        self._is_wanted.wait(_RESTORE_S)

    def _run(self, claim: Claims) -> None:
        try:
            claimed = claim(lambda: self._looked.set_result(None), self._keep_away)
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits
            if not self._looked.done():
                self._looked.set_exception(error)
            self._claimed.set_exception(error)
            return
        if not self._looked.done():
            self._looked.set_result(None)
        self._claimed.set_result(claimed)
