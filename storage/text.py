"""URLs in messages, without their secrets. Pure.

The same as `launcher.text.hide_secrets`, of which storage knows nothing: one table of tests holds both to one answer.
"""

from __future__ import annotations

import logging
import re

# A password may hold a slash, as every second secret key of AWS does; a port that a path follows is none.
_PASSWORD = re.compile(r"(://[^/\s:@'\"\[]*:)(?:[^/\s'\"]+|(?!:|\d+/)[^\s'\"]{1,400})@")
_TOKEN_FOR_USER = re.compile(r"(https?://)[^/\s:@'\"]+@")
# As Amazon, Google and Azure name what signs a URL, and services what they let somebody in for: no `max_tokens`, and
# no `tokenizer`. A backslash is no part of it: in JSON it belongs to a quotation mark that follows.
_SIGNED = re.compile(
    r"([?&;](?:[\w.-]{0,40}(?:token(?!s|i[sz])|secret|passw|signature|credential|api[_-]?key|access[_-]?key)[\w.-]{0,40}"
    r"|sig|pwd|auth)=)[^&;\s'\"#\\]+",
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """The text with `...` for passwords and signatures in its URLs, which logs and events are no place for."""
    if "://" not in text:
        return text
    return _SIGNED.sub(r"\1...", _TOKEN_FOR_USER.sub(r"\1...@", _PASSWORD.sub(r"\1...@", text)))


class DiscreetFormatter(logging.Formatter):
    """Formats records, tracebacks included, without the secrets of their URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return hide_secrets(super().format(record))
