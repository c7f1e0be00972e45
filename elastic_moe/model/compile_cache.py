"""The folders in which torch.compile keeps what it has made: whether they can be used, and what in them is torn.

torch has the compiler write a library to where later starts look for it (torch 2.13, `CppBuilder.build`): a compiler
that is killed leaves a part of one, which each of them would fail to load.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from elastic_moe.torch_private import COMPILE_CACHE, compile_caches, forget_compiled

_R = TypeVar("_R")
_LOCK = "elastic-moe.lock"

log = logging.getLogger(__name__)


@functools.cache
def cache_obstacle() -> str:
    """Why torch.compile's cache cannot be used, "" if it can. For the whole process, before it uses any of it.

    torch makes that folder when it imports its compiler, which all sharded tensors and optimizers do (torch 2.13,
    `_disable_dynamo`), and where that fails nothing can be trained. So one of no use is replaced by one that is there.
    """
    folder = compile_caches()[0]
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        os.environ[COMPILE_CACHE] = tempfile.gettempdir()
        return f"its cache {folder} cannot be used: {error.strerror} ({COMPILE_CACHE} names another)"


def remove_torn() -> None:
    """Remove the libraries in the cache that end before their end, and that nobody makes now.

    torch would fail to load one each time, or, where it only tries what the processor can, take slower code.
    """
    folder = Path(compile_caches()[0])
    torn = [path for path in sorted(folder.glob("*/*.so")) if _is_torchs(path) and _is_torn(path)]
    removed = [path for path in torn if _is_removed(path, folder / "locks" / f"{path.name.partition('.')[0]}.lock")]
    _tell(removed)


def _is_torchs(path: Path) -> bool:
    """Whether a file is named as torch names what it makes: a cache may be set to a folder that holds other things."""
    return path.parent.name == ("precompiled_headers" if path.suffix == ".gch" else path.name[1:3])


def _is_torn(path: Path) -> bool:
    """Whether a library lacks its beginning, or a part of the table of sections at its end; see elf(5)."""
    try:
        with path.open("rb") as file:
            head, num_bytes = file.read(64), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return True
    is_known = head[4:6] == b"\2\1"  # 64 bits, the lowest first
    (start,), (size, num) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return is_known and bool(num_bytes < start + size * num)


def _is_removed(path: Path, lock: Path) -> bool:
    """Remove a library unless another process makes it now, for which it holds torch's lock."""
    try:
        lock.parent.mkdir(exist_ok=True)
        with lock.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_torn(path):
                path.unlink()
                return True
    except OSError:
        pass
    return False


def without_torn(call: Callable[[], _R], error: Exception) -> _R:
    """Call again what has failed with `error`, without the files that it says are of no use.

    Ranks of a machine that find the same file do so one after another, and the second finds that made which the first
    has removed.

    Raises:
        Exception: what it fails with all the same, or `error`, where that is of no file in the cache.
    """
    if not named_in(error):
        raise error
    removed: set[Path] = set()
    with _alone(compile_caches()[0]):
        while True:
            try:
                return call()
            except Exception as again:
                torn = set(named_in(again)) - removed
                if not torn:
                    raise
            for path in torn:
                path.unlink(missing_ok=True)
            removed |= torn
            _tell(torn)
            forget_compiled()


def _tell(removed: Collection[Path]) -> None:
    if removed:
        log.warning("torn by a process that was killed, to be made anew: %s", ", ".join(map(str, sorted(removed))))


def named_in(error: BaseException) -> list[Path]:
    """Files of the cache, made by a compiler, that are there and that an error tells of, or one that it comes from.

    Of a compiled header gcc only says that it is of no use; which one it is, the command says.
    """
    told: list[str] = []
    seen: BaseException | None = error
    while seen is not None and str(seen) not in told:
        told.append(str(seen))
        seen = getattr(seen, "inner_exception", None) or seen.__cause__ or seen.__context__
    text = "\n".join(told)
    folders = "|".join(re.escape(folder) for folder in compile_caches())
    names = set(re.findall(rf"(?:{folders})/[^\s:'\"]+?\.(?:so|o|gch)\b", text))
    if re.search(r"PCH file|precompiled header:", text):
        names |= {f"{name}.gch" for name in re.findall(rf"(?:{folders})/[^\s:'\"]+?\.h\b", text)}
    return [path for path in map(Path, sorted(names)) if _is_torchs(path) and path.is_file()]


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    with open(Path(folder, _LOCK), "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
