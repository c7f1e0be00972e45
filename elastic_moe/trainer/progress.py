"""How far a training is, as one line for a person: what it says, and how a terminal shows it."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

_REDRAWN_EVERY_S = 0.1
_WINDOW_STEPS = 50
_CLEAR = "\r\x1b[2K"


@dataclass(frozen=True)
class Progress:
    """A step, as a person wants to know of it.

    Attributes:
        loss: nats; may be no finite number.
        tokens_per_s: over the last steps, with what lay between them; None after the first.
        utilisation: model FLOPs utilisation, 0 to 1; None where the devices' peak is unknown.
        mesh: degrees of replicate, shard and expert.
        left_s: seconds until the last step at this pace; None after the first.
    """

    step: int
    steps: int
    loss: float
    val_loss: float | None
    grad_norm: float
    tokens_per_s: float | None
    utilisation: float | None
    mesh: tuple[int, int, int]
    generation: int
    left_s: float | None

    def __str__(self) -> str:
        told = [f"step {self.step}/{self.steps}", f"loss {self.loss:.4f}"]
        if self.val_loss is not None:
            told.append(f"validation {self.val_loss:.4f}")
        told.append(f"grad norm {self.grad_norm:.3f}")
        if self.tokens_per_s is not None:
            told.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.utilisation is not None:
            told.append(f"MFU {self.utilisation:.1%}")
        told.append(f"mesh {'x'.join(map(str, self.mesh))}")
        if self.generation:
            told.append(f"generation {self.generation}")
        if self.left_s is not None and self.step < self.steps:
            told.append(f"{duration(self.left_s)} left")
        return "  ".join(told)


def duration(seconds: float) -> str:
    """A time as `9 s`, `4:05`, `3:04:05` or `2 d 03:04`."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minutes}:{second:02}" if minutes else f"{second} s"


class Pace:
    """Steps per second over the last ones. Times are arguments."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW_STEPS + 1)

    def saw(self, step: int, now_s: float) -> None:
        """Step `step` was complete at `now_s`."""
        self._seen.append((now_s, step))

    @property
    def steps_per_s(self) -> float | None:
        """None until two steps were seen."""
        if len(self._seen) < 2:
            return None
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None


def wants_line(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can draw a line anew."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


class LiveLine:
    """One line at the end of a terminal, drawn anew for each text; what is logged meanwhile goes above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._text = ""
        self._drawn_s: float | None = None
        self._handlers: list[logging.Handler] = []

    def __enter__(self) -> Self:
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream
        ]
        for handler in self._handlers:
            handler.addFilter(self._make_room)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler in self._handlers:
            handler.removeFilter(self._make_room)
        if self._text:
            self._draw()
            self._write("\n")

    def show(self, text: str, now_s: float) -> None:
        """Draw `text`, unless a line was drawn a moment ago."""
        self._text = text
        if self._drawn_s is None or now_s - self._drawn_s >= _REDRAWN_EVERY_S:
            self._drawn_s = now_s
            self._draw()

    def _draw(self) -> None:
        columns = shutil.get_terminal_size().columns
        self._write(_CLEAR + self._text[: max(1, columns - 1)])

    def _make_room(self, record: logging.LogRecord) -> bool:
        self._write(_CLEAR)
        self._drawn_s = None
        return True

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, and the training goes on
            self._stream.write(text)
            self._stream.flush()
