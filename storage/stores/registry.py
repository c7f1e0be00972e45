"""From a URL to a store: one table of schemes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, unquote, urlencode

from storage.errors import BadURL
from storage.stores.local import MODE, MODES, LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore

Opener = Callable[[str], ObjectStore]

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://(.*)$", re.DOTALL)
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):/(?!/)(.*)$", re.DOTALL)
_CHAIN = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*::[A-Za-z][A-Za-z0-9+.\-]*:")
_MODE = re.compile(r"\?mode=[^/]*$")
_openers: dict[str, Opener] = {}


def register_scheme(scheme: str, opener: Opener) -> None:
    """Let `opener` answer for `scheme://…`; it gets what follows the two slashes."""
    _openers[scheme.lower()] = opener


def is_everywhere(url: str) -> bool:
    """Whether another process that opens `url` opens the same: not memory, nor a store that this one has registered."""
    match = _SCHEME.match(url)
    if match is None:
        return True
    scheme = match[1].lower()
    return "memory" not in scheme and _openers.get(scheme) in (None, _open_file, _open_s3)


def is_of_this_process(url: str) -> bool:
    """Whether what is put there is gone with this process: in its memory, as ours or as fsspec's."""
    match = _SCHEME.match(url)
    if match is None or (scheme := match[1].lower()) in ("file", "s3"):
        return False
    from storage.stores.fsspec_store import is_memory

    return is_memory(scheme.removeprefix("fsspec+")) or "::memory:" in url


def as_url(url: object) -> str:
    """What a script gave for a URL, as text: a str, or a path object. `~` is the user's home, as in a shell.

    Raises:
        BadURL: it is neither, it is empty, or a path object has made `s3:/bucket` of `s3://bucket`.
    """
    text: object = url
    if isinstance(url, os.PathLike):
        # one that stands for a remote object says so; to ask it for a path of the file system could fetch that object
        text = str(url) if "://" in str(url) else os.fspath(url)
    if not isinstance(text, str):
        raise BadURL(
            f"the checkpoint URL is {' '.join(repr(url).split())[:60]} ({type(url).__name__}); give a folder as str or"
            " Path, or a URL such as s3://bucket/run"
        )
    if not text.strip():
        raise BadURL("the checkpoint URL is empty; give a folder or a URL such as file:///data/run")
    if "\0" in text:
        raise BadURL(f"the checkpoint URL {text!r} holds a NUL character")
    if not text.isprintable() and re.search("[\ud800-\udfff]", text):  # as Python has a path whose bytes are no text
        raise BadURL(f"the checkpoint URL {text!r} is no valid Unicode text, as events and receipts want it")
    if (match := _ONE_SLASH.match(text)) and _is_scheme(match[1].lower()):
        meant = f"{match[1]}:{'///' if match[1].lower() == 'file' else '//'}{match[2]}"
        raise BadURL(f"{text!r} has one slash too few, as Path leaves it; give {meant!r} as str")
    if _CHAIN.match(text):
        raise BadURL(f"{text!r} is a chain of file systems, which no store is opened through; give its last part alone")
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text:
        raise BadURL(f"the checkpoint URL {text!r} names a home that is not known here; give the whole path")
    return found


def has_store(url: str | os.PathLike[str]) -> bool:
    """Whether somebody answers for that URL; nothing is opened, and no package is looked for."""
    try:
        match = _SCHEME.match(as_url(url))
    except BadURL:
        return False
    return match is None or _is_scheme(match[1].lower())


def _is_scheme(scheme: str) -> bool:
    from storage.stores.fsspec_store import is_known

    return scheme in _openers or is_known(scheme.removeprefix("fsspec+"))


def open_store(url: str | os.PathLike[str]) -> ObjectStore:
    """Open the store that `url` names.

    A path, a `Path`, or `file:///path[?mode=0640]`; `s3://bucket/prefix`; `memory://name`; any other scheme that fsspec
    knows; and, to have fsspec's own for one of ours, `fsspec+s3://` and `fsspec+memory://`. Names are taken as they
    stand, as fsspec and the AWS command line do: `%20` is no space.

    The caller closes it.

    Raises:
        BadURL: no such scheme, a package for it is not installed, or the URL is not complete.
        Denied: there are no credentials.
    """
    url = as_url(url)
    match = _SCHEME.match(url)
    if match is None:
        if path := _MODE.search(url):
            raise BadURL(
                f"options need a URL: file://{os.path.abspath(url[: path.start()])}{path[0]} instead of {url!r}"
            )
        return LocalStore(url)
    scheme, rest = match[1].lower(), match[2]
    opener = _openers.get(scheme)
    store = _open_other(url, scheme, rest) if opener is None else opener(rest)
    if not isinstance(store, ObjectStore):
        raise TypeError(f"{scheme}:// was opened as a {type(store).__name__}, which does not inherit from ObjectStore")
    return store


def with_options(url: str, options: Mapping[str, str]) -> str:
    """`url` with further options in its query; of one that is there already the new value counts."""
    if not options:
        return url
    base, _, query = url.partition("?")
    merged = dict(parse_qsl(query, keep_blank_values=True)) | dict(options)
    return f"{base}?{urlencode(merged, safe=':/')}"


def _open_other(url: str, scheme: str, rest: str) -> ObjectStore:
    from storage.stores.fsspec_store import is_known, open_fsspec

    protocol = scheme.removeprefix("fsspec+")
    if not is_known(protocol):
        known = ", ".join(f"{name}://" for name in sorted(_openers))
        raise BadURL(f"no store for {scheme}:// in {url!r}; use a folder, {known}, or what fsspec knows (gs://, az://)")
    return open_fsspec(url, f"{protocol}://{rest}")


def _open_s3(rest: str) -> ObjectStore:
    try:
        from storage.stores.s3.store import open_s3
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("boto3", "botocore"):
            raise
        raise BadURL(
            f"s3:// needs {error.name}: pip install boto3 s3fs, or install elastic-moe with its extra s3"
        ) from None
    return open_s3(rest)


def _open_file(rest: str) -> ObjectStore:
    whole, mark, query = rest.partition("?")
    host, slash, path = whole.partition("/")
    if host not in ("", "localhost") or not slash or not path:
        raise BadURL(f"file://{rest} must be file:///absolute/path")
    mode = _parse_mode(query) if mark else MODE
    _check_spelling("/" + path)
    return LocalStore("/" + path, mode)


def _check_spelling(path: str) -> None:
    """Refuse `%20` where only the name with a blank is there: a run in it would begin anew. Raises BadURL."""
    meant = unquote(path)
    if meant != path and os.path.isdir(meant) and not os.path.exists(path):
        raise BadURL(
            f"file://{path} names no folder, and there is {meant!r}: write it so, names are taken as they stand"
        )


def _parse_mode(query: str) -> int:
    """The mode in the query of a `file://` URL, its one option. Raises BadURL."""
    options = dict(parse_qsl(query, keep_blank_values=True))
    text = options.pop("mode", "")
    if options or not text:
        raise BadURL(
            f"a file:// URL has the option mode, and not {query!r}; give a folder whose name has a ? as a path"
        )
    mode = int(text, 8) if re.fullmatch(r"0?[0-7]{3}", text) else -1
    if mode not in MODES:
        allowed = ", ".join(f"{mode:04o}" for mode in MODES)
        raise BadURL(f"the option mode={text} of a file:// URL is wrong: it is the mode of files, one of {allowed}")
    return mode


def _open_memory(rest: str) -> ObjectStore:
    name = rest.strip("/")
    if not name:
        raise BadURL("memory:// needs a name, such as memory://run")
    return MemoryStore.named(name)


register_scheme("file", _open_file)
register_scheme("memory", _open_memory)
register_scheme("s3", _open_s3)
