"""A request that must not take long, made once more beside itself where it does.

See Dean and Barroso, "The tail at scale", Communications of the ACM, 2013.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from launcher.errors import KVUnavailable

_ANSWER_S = 60.0  # each try ends by itself much earlier


def hedged(act: Callable[[], None], after_s: float) -> None:
    """Do what may be done twice; once more after `after_s`, if it is not done by then. Returns with the first success.

    Raises:
        KVUnavailable: no try succeeded; this is what the last one said.
    """
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 (told by the thread that waits)
            ended.put(error)
        else:
            ended.put(None)

    waits_s = [after_s, _ANSWER_S, _ANSWER_S]
    why: Exception = KVUnavailable("no answer")
    num_begun = num_ended = 0
    while num_ended < 2 and waits_s:
        if num_begun < 2:
            threading.Thread(target=attempt, name="kv-hedged", daemon=True).start()
            num_begun += 1
        try:
            error = ended.get(timeout=waits_s.pop(0))
        except queue.Empty:
            continue
        if error is None:
            return
        num_ended, why = num_ended + 1, error
    raise why
