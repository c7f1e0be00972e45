"""A worker's ear: what the service says, until the connection ends or nothing is heard for too long."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable

from storage.service.channel import Channel
from storage.service.messages import AskStatus, ProtocolError, ServiceMessage

log = logging.getLogger(__name__)

_LOOK_MS = 1000
_ASK_S = 10.0
_SILENT_S = 25.0
"""A service that has something to do and answers nothing for so long is slow, and saves may wait for it: it is told."""
_SILENCE_S = 90.0
"""And for so long: it is frozen."""


def listen(
    channel: Channel,
    hear: Callable[[Channel, ServiceMessage, list[int]], None],
    is_waiting: Callable[[], bool],
    is_closed: Callable[[], bool],
    on_silent: Callable[..., object],
) -> None:
    """Have `hear` called with each message, until the connection ends.

    A service that has something to do (`is_waiting`) is asked how it is now and then, and given up where it does not
    answer for too long. `on_silent` hears once in each silence how many `seconds` it has lasted, long before that.
    """
    heard_s = asked_s = time.monotonic()
    is_told = False
    poll, fd = select.poll(), channel.fileno()
    if fd < 0:  # who sent something has found the connection ended, and closed it
        return
    poll.register(fd, select.POLLIN)
    try:
        while not is_closed():
            if poll.poll(_LOOK_MS):
                received = channel.receive()
                if received is None:
                    return
                heard_s, is_told = time.monotonic(), False
                hear(channel, *received)
                continue
            now_s = time.monotonic()
            if not is_waiting():
                heard_s = now_s
            elif now_s - heard_s > _SILENCE_S:
                log.warning("the checkpoint service has not answered for %.0f s", now_s - heard_s)
                return
            elif now_s - max(heard_s, asked_s) > _ASK_S:
                asked_s = now_s
                channel.send(AskStatus())
            elif now_s - heard_s > _SILENT_S and not is_told:
                is_told = True
                on_silent(seconds=round(now_s - heard_s, 1))
    except (OSError, ProtocolError) as error:
        if not is_closed():
            log.warning("the connection to the checkpoint service has ended: %s", error)
    except Exception:  # nobody would hear of any save any more
        log.exception("what the checkpoint service says cannot be dealt with: another connection is made")
