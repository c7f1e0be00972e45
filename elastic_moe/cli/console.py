"""Writes the log to the console, with times that name their zone: lines of several nodes are read side by side.

Passwords in URLs are no part of it, whoever wrote the line.
"""

from __future__ import annotations

import datetime
import logging

from launcher import hide_secrets


class ZonedFormatter(logging.Formatter):
    """Date, time and offset from UTC: `2026-11-29 02:17:55.123+00:00`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with its traceback if it has one."""
        return hide_secrets(super().format(record))

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The time of the record, in this machine's time zone."""
        moment = datetime.datetime.fromtimestamp(record.created).astimezone()
        return moment.isoformat(sep=" ", timespec="milliseconds")


def log_to_console() -> None:
    """Have the log written to stderr from INFO on, unless somebody has arranged for it already."""
    handler = logging.StreamHandler()
    handler.setFormatter(ZonedFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
