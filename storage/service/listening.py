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
_SILENCE_S = 90.0
"""A service that has something to do and answers nothing for so long is frozen."""


def listen(
    channel: Channel,
    hear: Callable[[Channel, ServiceMessage, list[int]], None],
    is_waiting: Callable[[], bool],
    is_closed: Callable[[], bool],
) -> None:
    """Have `hear` called with each message, until the connection ends.

    A service that has something to do (`is_waiting`) is asked how it is now and then, and given up where it does not
    answer for too long.
    """
    heard_s = asked_s = time.monotonic()
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
                heard_s = time.monotonic()
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
    except (OSError, ProtocolError) as error:
        if not is_closed():
            log.warning("the connection to the checkpoint service has ended: %s", error)
    except Exception:  # nobody would hear of any save any more
        log.exception("what the checkpoint service says cannot be dealt with: another connection is made")
