"""From a URL to a store: one table of schemes."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from storage.errors import BadURL
from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.objects import ObjectStore

Opener = Callable[[str], ObjectStore]

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://(.*)$", re.DOTALL)
_openers: dict[str, Opener] = {}


def register_scheme(scheme: str, opener: Opener) -> None:
    """Let `opener` answer for `scheme://…`; it gets what follows the two slashes."""
    _openers[scheme.lower()] = opener


def open_store(url: str) -> ObjectStore:
    """Open the store that `url` names: a path, `file:///path` or `memory://name`.

    Raises:
        BadURL: no such scheme, or the URL is not complete.
    """
    if not url:
        raise BadURL("the checkpoint URL is empty; give a folder or a URL such as file:///data/run")
    match = _SCHEME.match(url)
    if match is None:
        return LocalStore(url)
    scheme, rest = match[1].lower(), match[2]
    opener = _openers.get(scheme)
    if opener is None:
        known = ", ".join(f"{name}://" for name in sorted(_openers))
        raise BadURL(f"no store for {scheme}:// in {url!r}; use a folder or one of {known}")
    return opener(rest)


def _open_file(rest: str) -> ObjectStore:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or not path:
        raise BadURL(f"file://{rest} must be file:///absolute/path")
    return LocalStore("/" + unquote(path))


def _open_memory(rest: str) -> ObjectStore:
    name = rest.strip("/")
    if not name:
        raise BadURL("memory:// needs a name, such as memory://run")
    return MemoryStore.named(name)


register_scheme("file", _open_file)
register_scheme("memory", _open_memory)
