"""What a client tidies up behind itself and, once an hour, behind those that are gone."""

from __future__ import annotations

from launcher.kv.bucket.beat import BEAT, beat_name
from launcher.kv.bucket.journal import KEPT_VERSIONS
from launcher.kv.bucket.ops import TURN, WISH
from launcher.kv.bucket.register import Register
from launcher.kv.bucket.shared import SharedJournal
from launcher.kv.bucket.version import LOG, TOMBSTONE, number_of, version_name

_TOMBSTONE_KEPT_S = 24 * 3600.0
_SWEEP_EVERY_S = 3600.0


class Upkeep:
    """For one thread."""

    def __init__(self, register: Register, journal: SharedJournal, now_s: float) -> None:
        self._register = register
        self._journal = journal
        self._next_sweep_s = now_s + _SWEEP_EVERY_S
        self._seen: dict[str, float] = {}  # what may have to go, and since when that is known

    def tidy(self, now_s: float) -> None:
        """Replace old versions by tombstones, remove what nobody needs; what was long left over, too.

        Raises:
            KVUnavailable: the rest is left to a sweep.
        """
        authored, litter = self._journal.take_litter()
        for number in authored:
            if number > KEPT_VERSIONS:
                self._register.write(version_name(number - KEPT_VERSIONS), TOMBSTONE)
        for name in litter:
            self._register.remove(name)
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + _SWEEP_EVERY_S
            self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        """Tombstones go once they have stood for a day; of clients that are gone, their beats, wishes and turns."""
        oldest = self._journal.number - 2 * KEPT_VERSIONS
        passed = [name for name in self._register.names(LOG) if 0 < number_of(name) < oldest]
        beats = self._register.names(BEAT)
        renewed = {beat_name(lease_id) for lease_id in self._journal.look().leases()}
        left = [name for name in beats if name not in renewed]
        left += [*self._register.names(WISH), *self._register.names(TURN)]
        kept_s = {**dict.fromkeys(passed, _TOMBSTONE_KEPT_S), **dict.fromkeys(left, _SWEEP_EVERY_S / 2)}
        self._seen = {name: self._seen.get(name, now_s) for name in kept_s}
        for name, since_s in self._seen.items():
            if now_s - since_s > kept_s[name]:
                self._register.remove(name)
