"""Pieces of messages: how a process ended, lists that have to stay short, and URLs without their secrets. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

_MAX_NAMED = 4
_MAX_CHARS = 300
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


def describe_end(code: object) -> str:
    """How a process ended, in words; `code` as Popen has it."""
    if not isinstance(code, int) or code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


def name_some(things: Sequence[str], separator: str = ", ") -> str:
    """A list for a record that every node reads: the first few, cut to a length, and how many more there are.

    Nodes give a round's reason as their own and the leader joins theirs into the next: in full, that of a large job
    would outgrow what etcd takes.
    """
    named = [thing if len(thing) <= _MAX_CHARS else f"{thing[:_MAX_CHARS]}..." for thing in things[:_MAX_NAMED]]
    more = [f"and {len(things) - _MAX_NAMED} more"] if len(things) > _MAX_NAMED else []
    return separator.join([*named, *more])


def hide_secrets(text: str) -> str:
    """The text with `...` for passwords and signatures in its URLs, which logs and events are no place for."""
    if "://" not in text:
        return text
    return _SIGNED.sub(r"\1...", _TOKEN_FOR_USER.sub(r"\1...@", _PASSWORD.sub(r"\1...@", text)))
