"""Watchers for the news that this machine is about to be taken away, or that a person wants it back.

A watcher is asked again and again on a thread of its own, so it may take its time. Built in are `file:PATH`, `aws`,
`gcp` and `azure`; packages add others through the entry point group `elastic_moe.preemption`, whose names are what
`--preemption-notice NAME[:ARGUMENT]` takes and whose values are `factory(argument: str) -> Watcher`.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from launcher.drain import clouds
from launcher.drain.draining import DrainOrder, DrainSource
from launcher.drain.notices import Notice, believed, seconds_left
from launcher.errors import UsageError
from launcher.events import Emit, EventName
from launcher.lifecycle import Lifecycle

log = logging.getLogger(__name__)

GROUP = "elastic_moe.preemption"


class Watcher(Protocol):
    """Something that knows when this machine goes. `poll` is called from one thread, `poll_s` seconds apart."""

    poll_s: float

    def poll(self) -> Notice | None:
        """Return the notice that there is now, None while there is none. May block for some seconds.

        Raises:
            Exception: whoever is asked does not answer. The failure is told once, and the watcher is asked again.
        """
        ...


Factory = Callable[[str], Watcher]


class FileWatcher:
    """Waits for a file. It may hold how many seconds are left, or an ISO time (UTC, where it names no zone)."""

    poll_s = 0.5

    def __init__(self, argument: str) -> None:
        """`argument` is the path.

        Raises:
            ValueError: the path is empty.
        """
        if not argument:
            raise ValueError("expected file:PATH")
        self._path = Path(argument)

    def poll(self) -> Notice | None:
        try:
            with self._path.open(errors="replace") as file:
                text = file.read(100).strip()
        except FileNotFoundError:
            return None
        return Notice(f"the file {self._path}", _time_in(text))


def _time_in(text: str) -> float | None:
    try:
        return believed(float(text))
    except ValueError:
        pass
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return seconds_left(when, time.time())


class OrderWatcher:
    """Watches for an order of `elastic-moe drain`, as far as the store has shown it to this node."""

    poll_s = 0.2

    def __init__(self, order: Callable[[], DrainOrder | None]) -> None:
        self._order = order

    def poll(self) -> Notice | None:
        order = self._order()
        return Notice(f"elastic-moe drain by {order.by}", order.grace_s, DrainSource.COMMAND) if order else None


_BUILT_IN: Mapping[str, Factory] = {
    "file": FileWatcher,
    "aws": clouds.AwsSpot,
    "gcp": clouds.GcpPreemption,
    "azure": clouds.AzureScheduledEvents,
}


def watchers(specs: Sequence[str]) -> dict[str, Watcher]:
    """Make the watchers that `--preemption-notice` names; returns them by what was given.

    Raises:
        UsageError: there is no such watcher, it cannot be loaded, or its argument is wrong.
    """
    return {spec: _watcher(spec) for spec in specs}


def _watcher(spec: str) -> Watcher:
    name, _, argument = spec.partition(":")
    try:
        return _factory(name)(argument)
    except ValueError as error:
        raise UsageError(f"--preemption-notice {spec}: {error}") from error


def _factory(name: str) -> Factory:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        known = [*_BUILT_IN, *sorted(installed)]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise ValueError(f"there is no such watcher; {hint}")
    try:
        factory: Factory = installed[name].load()
    except Exception as error:
        raise ValueError(f"{installed[name].value} cannot be loaded: {type(error).__name__}: {error}") from error
    return factory


class NoticeWatch(Lifecycle):
    """Asks every watcher on a thread of its own."""

    def __init__(self, found: Mapping[str, Watcher], heed: Callable[[Notice], None], emit: Emit) -> None:
        """`heed` is called from the watcher's thread, once for each watcher at most."""
        self._heed = heed
        self._emit = emit
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(name, watcher), name=f"notice-{name}", daemon=True)
            for name, watcher in found.items()
        ]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def _watch(self, name: str, watcher: Watcher) -> None:
        is_troubled = False
        hints: set[str] = set()
        while not self._stopped.is_set():
            notice = None
            try:
                notice = watcher.poll()
                is_troubled = False
            except Exception as error:  # noqa: BLE001 (others' code; without this thread no notice would be heard)
                if not is_troubled:
                    self._emit(
                        EventName.PREEMPTION_WATCH_FAILED, watcher=name, reason=f"{type(error).__name__}: {error}"
                    )
                is_troubled = True
            if notice is not None and notice.is_final:
                self._heed(notice)
                return
            if notice is not None and notice.detail not in hints:
                hints.add(notice.detail)
                self._emit(EventName.PREEMPTION_HINT, watcher=name, detail=notice.detail)
            self._stopped.wait(watcher.poll_s)

    def close(self) -> None:
        """Ask no more; a watcher that is being asked is not waited for."""
        self._stopped.set()
