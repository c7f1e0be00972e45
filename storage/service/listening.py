"""A worker's ear: what the service says, until the connection ends or nothing is heard for too long."""

from __future__ import annotations

import logging
import select
from collections.abc import Callable

from storage.service.channel import Channel
from storage.service.messages import AskStatus, ProtocolError, ServiceMessage

log = logging.getLogger(__name__)

_LOOK_MS = 1000
_ASK_S = 10.0
_SILENT_S = 25.0
"""A service that has something to do and answers nothing for so long is slow, and saves may wait for it: it is told."""
_SILENCE_S = 90.0
"""And for so long: it is frozen. By looks: while this process was stopped it could have heard nothing."""


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
    silent_s = unasked_s = 0.0
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
                silent_s, unasked_s, is_told = 0.0, 0.0, False
                hear(channel, *received)
                continue
            silent_s, unasked_s = silent_s + _LOOK_MS / 1000, unasked_s + _LOOK_MS / 1000
            if not is_waiting():
                silent_s = unasked_s = 0.0
            elif silent_s > _SILENCE_S:
                log.warning("the checkpoint service has not answered for %.0f s", silent_s)
                return
            elif unasked_s > _ASK_S:
                unasked_s = 0.0
                channel.send(AskStatus())
            elif silent_s > _SILENT_S and not is_told:
                is_told = True
                on_silent(seconds=round(silent_s, 1))
    except (OSError, ProtocolError) as error:
        if not is_closed():
            log.warning("the connection to the checkpoint service has ended: %s", error)
    except Exception:  # nobody would hear of any save any more
        log.exception("what the checkpoint service says cannot be dealt with: another connection is made")
