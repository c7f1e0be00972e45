"""Electing who holds a key, after `Election` of etcd's `clientv3/concurrency`: mechanics only, no thread, no callback.

The claim lies under its candidate's lease, so a leader that is lost makes room by itself. One that goes may leave its
last words in the key, which its successor reads when the lease ends.
"""

from __future__ import annotations

import logging

from launcher.errors import KVUnavailable
from launcher.kv.base import KV, Entry
from launcher.kv.lease import Lease

log = logging.getLogger(__name__)

_NUM_LAST_WORDS = 2  # the endpoint in use may be down; one that was carried out unheard makes the next one void


class Election:
    """One candidate for `key`. For one thread at a time, except `depose`, which any may call.

    `held` is the candidate's own claim as far as it has heard: another's may stand there by now. That is why every
    write here compares revisions, and every write of a leader should.
    """

    def __init__(self, kv: KV, key: str) -> None:
        self._kv = kv
        self._key = key
        self.held: Entry | None = None
        self._value: bytes | None = None  # of the last claim, made or only tried; None after `resign`
        self._lease: Lease | None = None
        self._since_revision = 0  # what was seen earlier is older than what this candidate did itself

    def leader(self) -> Entry | None:
        """Who holds the key, asked from the store; None if nobody does.

        Raises:
            KVUnavailable
        """
        return self._kv.get(self._key)

    def campaign(self, value: bytes, lease: Lease) -> Entry | None:
        """Claim the key if nobody holds it; never waits for whoever does.

        `value` names the candidate: no other may give the same. A claim of it that stands already, say because the
        answer to an earlier call was lost, is held as well.

        Returns:
            The claim; None where another candidate holds the key, or the lease has ended.

        Raises:
            KVUnavailable: the store does not answer. The claim may have been made: call again, or `observe`.
        """
        self._value, self._lease = value, lease
        made = self._kv.put(self._key, value, if_revision=0, lease=lease)
        if made is None and (there := self._kv.get(self._key)) is not None and there.value == value:
            made = there
        return self._hold(made)

    def observe(self, there: Entry | None, revision: int) -> None:
        """Note what the key has been seen to hold at the store's `revision`, say by a `Follower`.

        A claim of this candidate's is held from then on even where its making was not heard; one that was deleted, or
        taken over, is no longer held.
        """
        if revision < self._since_revision:
            return
        if self.held is not None:
            own = there is not None and there.create_revision == self.held.create_revision
        else:
            own = there is not None and there.value == self._value
        self._hold(there if own else None)

    def proclaim(self, value: bytes) -> Entry | None:
        """Change what the claim says.

        Returns:
            The claim as it is now; None where it is not held any more.

        Raises:
            KVUnavailable: the store does not answer. The change may have been made: `observe` before another.
        """
        if self.held is None:
            return None
        return self._hold(self._kv.put(self._key, value, if_revision=self.held.revision, lease=self._lease))

    def resign(self, last_words: bytes | None = None) -> None:
        """Give the claim up, if it is held. Another's is never touched.

        Without `last_words` the key is deleted, and another candidate can claim it at once. With them the key holds
        them until the lease ends; they are lost where the store does not answer twice.

        Raises:
            KVUnavailable: the store does not answer, and there are no last words; call again.
        """
        if self.held is None:
            return
        if last_words is None:
            self._kv.delete(self._key, if_revision=self.held.revision)
        else:
            self._leave_word(last_words, self.held.revision)
        self._since_revision = self.held.revision + 1
        self.held = self._value = None

    def depose(self, revision: int) -> bool:
        """Delete the claim of `revision`, whoever's: its leader is known to be dead. False if it has gone already.

        Raises:
            KVUnavailable
        """
        return self._kv.delete(self._key, if_revision=revision)

    def _hold(self, claim: Entry | None) -> Entry | None:
        self.held = claim
        if claim is not None:
            self._since_revision = claim.revision
        return claim

    def _leave_word(self, last_words: bytes, revision: int) -> None:
        for _ in range(_NUM_LAST_WORDS):
            try:
                self._kv.put(self._key, last_words, if_revision=revision, lease=self._lease)
                return
            except KVUnavailable as error:
                log.warning("last words not written: %s", error)
