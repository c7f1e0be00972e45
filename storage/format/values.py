"""Items of what is no tensor: a `torch.save` zip of a pickle, which is loaded without executing anything of it.

What `safe_pickle` does not know, but torch does (sparse tensors, classes that the user has registered with
`torch.serialization.add_safe_globals`), is left to `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from storage.errors import Corrupt, UnloadableValue, UnsupportedValue, one_line
from storage.format import safe_names, safe_pickle
from storage.format.equality import is_plain, same
from storage.format.framing import EncodedItem
from storage.format.safe_pickle import Malformed, Refused, UnknownName
from storage.format.zips import ZIP_ERRORS, Window, member_start
from storage.stores.buffers import Buffer

_KEEP = (
    "keep plain Python values, numpy arrays and tensors in the state (of an enum its value, of a dataclass or named"
    " tuple its fields in a dict, of a generator its state)"
)


def encode_value(key: str, value: Any) -> EncodedItem:
    """The item of anything that is no tensor.

    Raises:
        UnsupportedValue: `decode_value` could not load it, or not as what it is.
    """
    sink = io.BytesIO()
    try:
        torch.save(value, sink)
    except Exception as error:
        kind = type(value).__qualname__
        raise UnsupportedValue(f"state {key!r} is a {kind} that cannot be saved: {error}") from error
    data = sink.getvalue()
    if not is_plain(value):
        check_value(data, key, value)
    return EncodedItem((data,), 0, len(data))


def check_value(data: Buffer, key: str, *value: Any) -> None:
    """Raises UnsupportedValue unless `decode_value` would load the item, and as what `value` is, if that is given."""
    try:
        found = _decode(data)
    except (Refused, Malformed) as error:
        raise UnsupportedValue(f"state {key!r} holds {error}, which no safe loader can read back; {_KEEP}") from None
    if value and not same(value[0], found):
        kind = type(value[0]).__qualname__
        raise UnsupportedValue(f"state {key!r} is a {kind} that would not come back as what it is; {_KEEP}")


def decode_value(data: Buffer, key: str, *, is_checked: bool = True) -> Any:
    """The value of an item, loaded without executing code.

    Args:
        is_checked: the item's bytes are known to be what was written. Else its zip has to say so.

    Raises:
        UnloadableValue: it is intact, but holds what is not loaded.
        Corrupt: it makes no sense, and no checksum says that it is what was written.
    """
    try:
        return _decode(data)
    except Refused as error:
        raise UnloadableValue(
            f"{key!r} holds {error}, which is not loaded, as loading it could run code. Nothing is damaged. Leave the"
            f" key out of the state, with ignore=[{key!r}]; or, if it is a class that you trust, call"
            " torch.serialization.add_safe_globals([...]) with it on every rank before; or save the checkpoint anew"
            " without it"
        ) from None
    except Malformed as error:
        if is_checked or _is_summed(data):
            raise UnloadableValue(
                f"{key!r} cannot be loaded, though its bytes are what was written ({error}); leave the key out of the"
                " state, or read it with the program that has written it"
            ) from None
        raise Corrupt(f"item {key!r} cannot be loaded: {error}") from None


def check_sense(data: Buffer, name: str) -> None:
    """Of an item without a checksum of its pickle: that there is sense in it. Raises Corrupt."""
    if not _is_summed(data):
        with contextlib.suppress(UnloadableValue):
            decode_value(data, name, is_checked=False)


@dataclass(frozen=True)
class _Archive:
    """The members of a `torch.save` zip, by name without the folder; `sums` are their CRC32."""

    members: dict[str, memoryview]
    sums: dict[str, int]


def _archive(data: Buffer) -> _Archive:
    """Raises Malformed."""
    view = memoryview(data).cast("B")
    members, sums = {}, {}
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(view.nbytes, ((0, view),)))) as archive:
            for member in archive.infolist():
                start = member_start(view, member.header_offset)
                if member.compress_type != zipfile.ZIP_STORED or start + member.file_size > view.nbytes:
                    raise Malformed("it is a zip that torch.save does not write")
                name = member.filename.partition("/")[2]
                members[name], sums[name] = view[start : start + member.file_size], member.CRC
    except ZIP_ERRORS as error:
        raise Malformed(f"it is no zip of torch.save: {error}") from None
    if "data.pkl" not in members:
        raise Malformed("it is no zip of torch.save: it has no data.pkl")
    if bytes(members.get("byteorder", b"little")) != b"little":
        raise Refused("values in another byte order")
    return _Archive(members, sums)


def _is_summed(data: Buffer) -> bool:
    """Whether the zip holds a checksum for its pickle, which whoever asks has compared."""
    try:
        return bool(_archive(data).sums["data.pkl"])
    except (Malformed, Refused):
        return False


def _decode(data: Buffer) -> Any:
    """Raises Refused, Malformed."""
    members = _archive(data).members
    storages: dict[str, torch.UntypedStorage] = {}

    def load(key: str, size_bytes: int) -> torch.UntypedStorage:
        content = members[f"data/{key}"]
        if content.nbytes != size_bytes:
            raise Malformed("a storage of another size than its tensor says")
        if key not in storages:
            # not over memory of Python's: that could not be resized
            memory = torch.frombuffer(bytearray(content), dtype=torch.uint8).clone() if size_bytes else torch.empty(0)
            storages[key] = memory.untyped_storage()
        return storages[key]

    text = bytes(members["data.pkl"])
    try:
        return safe_pickle.read(text, safe_names.names_of(load))
    except UnknownName as error:
        if not _is_known_to_torch(str(error)) or b"bytearray\n" in text:  # torch makes one of any size
            raise
        safe_pickle.read(text, safe_names.outline_names_of(load))  # torch bounds neither keys nor sizes
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as second:  # noqa: BLE001 - whatever torch cannot load, for whatever reason
            raise Refused(_reason(error, second)) from None


def _is_known_to_torch(name: str) -> bool:
    registered = (of[1] if isinstance(of, tuple) else f"{of.__module__}.{of.__qualname__}" for of in _registered())
    return name.startswith("torch.") or name in registered


def _registered() -> list[Any]:
    return torch.serialization.get_safe_globals()


def _reason(unknown: UnknownName, error: Exception) -> str:
    """What torch does not load: mostly that very name, or another one, which it has in its message."""
    text = one_line(str(error))
    _, found, rest = text.partition("GLOBAL ")
    return rest.split(" ", 1)[0] if found else f"{unknown} ({text[:200]})"
